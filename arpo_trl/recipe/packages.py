"""The packages that some keys need."""

# Words in the names of transformers' optimizers, and the package that those names need; the first that fits.
OPTIMIZERS = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "torch_4bit torch_8bit": "torchao",
    "bnb 8bit 32bit paged lion ademamix": "bitsandbytes",
    "schedule_free": "schedulefree",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "torch_xla": "torch_xla",
    "npu": "torch_npu",
}


# Who quantized a base, and the packages that read it: transformers 5.24 reads AWQ with gptqmodel, PEFT asks for optimum
PACKED = {"gptq": "gptqmodel optimum", "awq": "gptqmodel optimum", "aqlm": "aqlm", "bitsandbytes": "bitsandbytes"}
