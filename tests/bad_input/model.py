"""What is wrong with a model: a row is what is spoiled, and the words that refuse it."""

import json

from transformers import GPT2Config

from bad_input.case import settings
from nbutils.data.templates import PAD_CANDIDATES


def gated(case):
    case.settings["model"] = "meta-llama/gated"


def no_llama(case):
    base = case.base()
    (base / "config.json").write_text(GPT2Config().to_json_string())


def cut_weights(case):
    file = case.base() / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


def without(name):
    return lambda case: (case.base() / name).unlink()


def damaged(name):
    def damage(case):
        file = case.base() / name
        file.unlink()
        file.write_text("{")

    return damage


def too_few_embeddings(case):
    case.base(vocab_size=512)


def no_padding_token(case):
    base = case.base()
    told = json.loads((base / "tokenizer_config.json").read_text())
    told["pad_token"] = told["eos_token"]
    words = (base / "tokenizer.json").read_text()
    for token in PAD_CANDIDATES:
        words = words.replace(token, token.upper())
    for name, text in {"tokenizer_config.json": json.dumps(told), "tokenizer.json": words}.items():
        (base / name).unlink()  # a link to the cached one
        (base / name).write_text(text)


CASES = {
    "gated model": (gated, r"meta-llama/gated is behind a licence\. Accept it on .* hf auth login"),
    "no such model on the hub": (
        settings(model="nobody/nothing"),
        r"nobody/nothing is neither a local folder nor a model",
    ),
    "no such folder": (settings(model="./no/such/folder"), r"There is no folder \./no/such/folder"),
    "folder without a model": (without("config.json"), r"holds no config\.json"),
    "damaged config": (damaged("config.json"), r"config\.json is no JSON object"),
    "unsupported architecture": (no_llama, r"is a gpt2; wanted a model of the architecture llama"),
    "quantised in another way": (
        lambda case: case.base(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantised as gptq; wanted NF4",
    ),
    "4-bit, but not NF4": (
        lambda case: case.base(
            quantization_config={
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
            }
        ),
        r"is quantised as fp4; wanted NF4",
    ),
    "weights cut short": (cut_weights, r"model\.safetensors in .* is cut short or damaged"),
    "weights missing": (without("model.safetensors"), r"holds neither model\.safetensors nor"),
    "damaged tokenizer": (damaged("tokenizer.json"), r"The tokenizer of .* cannot be read"),
    "tokenizer of another model": (too_few_embeddings, r"has 1,024 tokens and the model 512"),
    "tokenizer that cannot pad": (no_padding_token, r"no padding token of its own, .* and none of"),
}
