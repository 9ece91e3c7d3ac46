"""Reads the weights of a Hugging Face folder, once for all processes. It knows nothing of the algorithm."""

import os
from contextlib import suppress
from pathlib import Path

import torch
import transformers

from support.attention import NAME, register
from support.cli import UserError
from support.distributed import rank, tell_all


def read_weights(path, dtype: torch.dtype, device: str):
    """(the Hugging Face model, why it does not take support/attention.py's attention or "").

    Of a checkpoint that reads images too it is the whole model, of which the text part is used.
    Raises ValueError where a weight is missing: it would be random.
    """
    register()  # not on import: it takes seconds, and a complete stage should say so at once
    text, images = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    ours = {"attn_implementation": NAME}
    # Our attention, our attention in a model that reads images too, the model's own.
    for kind, attention in ((text, ours), (images, ours), (text, {})):
        try:
            model, report = kind.from_pretrained(
                path, dtype=dtype, output_loading_info=True, **attention
            )
            break
        except Exception as e:  # noqa: BLE001  a model of another kind raises all kinds
            error = e
    else:
        raise error
    if report["missing_keys"]:
        raise ValueError(f"no {min(report['missing_keys'])} in the weights")
    why = "" if attention else "its attention is written into it"
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        # Whatever its config says: other processes build by it, and a saved copy is read by it.
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.to(device).eval(), why


def read_generation_config(path, config):
    """What `from_pretrained` would take for the model's generation config, without the weights."""
    if (Path(path) / "generation_config.json").exists():
        return transformers.GenerationConfig.from_pretrained(path)
    if not Path(path).is_dir():
        with suppress(OSError):  # many a model of the hub has none
            return transformers.GenerationConfig.from_pretrained(path)
    return transformers.GenerationConfig.from_model_config(config)


def read_once(read):
    """read(), which gives a model.LM, in the first process alone, since whole weights of each would
    fill the host's memory. The others build the same model of shapes alone (torch's "meta"
    device); `bring_weights` gives them their weights."""
    lm, wrong = None, ""
    if rank() == 0:
        threads = torch.get_num_threads()  # torchrun gives each process one
        torch.set_num_threads(max(1, os.cpu_count() // 2))  # the others wait
        try:
            lm = read()
        except UserError as e:
            wrong = str(e)
        torch.set_num_threads(threads)
    if wrong := tell_all(wrong):
        raise UserError(wrong)
    if rank() == 0:
        model = lm.model
        lm.hold(None)  # the weights stay here, the rest is sent
        tell_all((lm, type(model), model.config))
    else:
        lm, kind, config = tell_all(None)
        register()
        with torch.device("meta"):
            model = kind(config).eval()
    lm.hold(model)
    return lm
