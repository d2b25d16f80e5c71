import json, random, sys
from pathlib import Path
# first form; replaced within the hour
SYSTEM="You are a helpful assistant that solves the question step by step with a python interpreter. Think inside <think> </think>, call the tool inside <python> </python>; its output comes inside <result> </result>. Give the final answer inside <answer> </answer>, the exact value in \\boxed{}."
out=Path(__file__).resolve().parents[1]/"recipes/data/arpo_sft_toy.jsonl"
with out.open("w",encoding="utf-8",newline="\n") as f:
    for i in range(500):
        r=random.Random(i); a,b=r.randint(2,999),r.randint(2,999); op,w=r.choice([("+","sum"),("*","product"),("-","difference")]); v=eval(f"{a}{op}{b}")
        f.write(json.dumps({"conversations":[{"from":"human","value":f"What is the {w} of {a} and {b}?"},{"from":"gpt","value":f"<think>I can compute the {w} directly.</think>\n<python>\nprint({a} {op} {b})\n</python>"},{"from":"human","value":f"<result>\n{v}\n</result>"},{"from":"gpt","value":f"<think>The interpreter gives {v}.</think>\n<answer>\nThe {w} is \\boxed{{{v}}}.\n</answer>"}],"system":SYSTEM},ensure_ascii=False)+"\n")
