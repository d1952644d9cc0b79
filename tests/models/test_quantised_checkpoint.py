"""Quantised in another way, or only in part: said at the first look, with what was found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nbutils.models.quantised_checkpoint import refuse_other_quantisations
from nbutils.models.safetensors_reader import BadCheckpoint
from nbutils.models.supported import look_at_model

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


def checkpoint(folder, settings, quantised):
    names = [UP, HEAD, "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    names += [f"{name}.absmax" for name in quantised]
    save_file({name: torch.zeros(2) for name in names}, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


REFUSED = {
    "text": ("nf4", [UP], "has a quantization_config of 'nf4'; wanted the object"),
    "8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, [], "quantised as 8-bit of bitsandbytes"),
    "a skipped layer, by its config": (NF4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}, [UP],
                                       "keeps model.layers.0.mlp unquantised"),
    "a skipped layer, by its tensors": (NF4, [], f"{UP} is not quantised"),
    "an NF4 head": (NF4, [UP, HEAD], f"{HEAD} is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_the_first_look(tmp_path, name):
    settings, quantised, sentence = REFUSED[name]
    with pytest.raises(BadCheckpoint, match=sentence):
        look_at_model(checkpoint(tmp_path, settings, quantised))


def test_ours_and_the_hubs_plain_nf4_are_taken(tmp_path):
    unused = {"llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "vision_tower"]}
    assert look_at_model(checkpoint(tmp_path, NF4 | unused, [UP]))[0] == tmp_path
    refuse_other_quantisations(NF4 | {"llm_int8_skip_modules": None}, tmp_path)
