"""LLaMA-Factory's names of templates, and what each means here. docs/templates.md has them in a table."""

import difflib

SHIPPED = frozenset(
    """
    alpaca chatml chatml_de cohere cpm4 dbrx deepseek deepseek3 deepseekcoder deepseekr1 default ernie
    ernie_nothink exaone falcon_h1 gemma granite3 hunyuan hunyuan_small hy3 intern2 llama2 llama2_zh llama3 mimo
    mimo_v2 mistral moonlight olmo openchat openchat-3.6 opencoder phi phi4 phi_small qwen qwen3 qwen3_5
    qwen3_5_nothink qwen3_6 qwen3_nothink sailor seed_coder smollm smollm2 starchat telechat2 vicuna xuanyuan yi yuan zephyr
    """.split()
)
"""Written by arpo_trl/data/templates as LLaMA-Factory writes them."""

THE_TOKENIZERS_OWN = frozenset(
    """
    aeva aquila atom baichuan baichuan2 bailing bailing_v2 belle billa bluelm breeze chatglm2 chatglm3
    chatglm3_raw chatglm3_system codegeex2 codegeex4 cpm cpm3 empty falcon fewshot gemma2 glm4 glm4_7 glm4_moe
    glmz1 gpt gpt_oss granite4 index intern lfm2 linly marco minimax1 minimax2 ministral nanbeige
    nanbeige_nothink orion phi4_mini seed_oss skywork_o1 solar telechat vanilla xverse yayi youtu ziya
    """.split()
)
"""Names of text templates that are not shipped: the tokenizer's own template is used."""

MULTIMODAL = frozenset(
    """
    dots_ocr ernie_vl gemma3 gemma3n gemma4 gemma4n glm4_5v glm4v glm_ocr granite3_vision hunyuan_vl intern_s1
    intern_vl keye_vl kimi_vl lfm2_vl llama4 llava llava_next llava_next_llama3 llava_next_mistral
    llava_next_qwen llava_next_video llava_next_video_mistral llava_next_video_yi llava_next_yi mimo_vl
    mimo_vl_nothink minicpm_o minicpm_v minicpm_v_4_6 ministral3 mistral_small mllama moss_vl paligemma
    paligemma_chat pixtral qwen2_audio qwen2_omni qwen2_vl qwen3_omni
    qwen3_omni_nothink qwen3_vl qwen3_vl_nothink video_llava yi_vl youtu_vl
    """.split()
)


def check_template_name(template: str) -> str | None:
    """What is wrong with the value of `template`, or None. A path ends in .jinja and is not looked at here."""
    if template.endswith(".jinja") or template in SHIPPED | THE_TOKENIZERS_OWN:
        return None
    if template in MULTIMODAL:
        return f"{template} is a template for images, sound or video, which are not trained here; for text rows leave template out"
    near = difflib.get_close_matches(template, sorted(SHIPPED | THE_TOKENIZERS_OWN), n=1)
    return (
        f"there is no template {template!r}{f'; the nearest is {near[0]}' if near else ''}; "
        "expected one of LLaMA-Factory's names (--help template lists them), a path that ends in .jinja, or no template at all "
        "for the tokenizer's own"
    )
