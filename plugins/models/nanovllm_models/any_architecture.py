"""The `transformers` model: any causal language model that the installed transformers has a class for.

Its own forward runs, so whatever it computes is right by definition; what is paid for that: documents run apart, as
padded rows in groups of like length; generation reads each sequence again for every token; logits of a whole group
exist at once; and it cannot be split by tensor parallelism. `Shape.limits` says so, with reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nanovllm_core.contracts import Accept, ModelRef, Module, Ops, Refuse, Shape, Verdict
from nanovllm_core.errors import ModelError, nearest
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.hub import is_gguf, resolve
from nanovllm_core.literals import literal
from nanovllm_core.weights import ModelFolder
from nanovllm_models.families.reader import LAYERS
from nanovllm_models.opening import config_of, open_model

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS_NAMED = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
UNBOUNDED = 1 << 20  # positions of a model whose configuration names no bound
LIMITS: Mapping[str, str] = {
    "packing": "its attention is its own and knows no document borders; each document runs as a padded row",
    "cache": "its cache is its own and not the engine's; each new token runs its whole sequence again",
    "tensor": "its layers are its own and nothing says how to split them",
}


@frozen(kw_only=True, eq=False)
class Transformers:
    """Any other causal language model of transformers, from a folder or the Hugging Face hub.

    path: the model's folder (relative ones count from the recipe's folder) or its hub name, such as EleutherAI/pythia-70m
    """

    path: ModelRef

    @hookimpl
    def probe(self) -> Verdict:
        """Below every native model: what those take runs faster there."""
        if is_gguf(self.path):
            return Refuse(f"{self.path}: `use: pretrained` opens GGUF files")
        try:
            return Accept(-10, f"{_class_name(config_of(self.path))} of transformers")
        except ModelError as e:
            return Refuse(str(e))

    @hookimpl
    def tokenizer(self) -> Mapping[str, Any]:
        return {"use": "hf", "path": self.path}

    @hookimpl
    def shape(self, vocab_size: int) -> Shape:
        """The outline of the folder's model, after comparing the tensors that it holds with those that it should."""
        folder, outline = self._folder(), self._outline()
        c = outline.config.get_text_config(decoder=True)
        if vocab_size > c.vocab_size:
            raise ModelError(
                f"{self.path}: the tokenizer has {vocab_size:,} ids, the model's embedding has {c.vocab_size:,} rows. "
                "Use the model's own tokenizer (leave `tokenizer` out of the recipe)"
            )
        parameters = {_names(outline)[name]: p for name, p in outline.named_parameters()}
        for name, parameter in parameters.items():
            stored = folder.shape(self._stored(name))
            if stored != tuple(parameter.shape):
                raise ModelError(f"{self.path}: {name} is stored as {list(stored)}, expected {list(parameter.shape)}")
        heads = getattr(c, "num_attention_heads", 0) or 0
        head = outline.get_output_embeddings()
        return Shape(
            family=c.model_type,
            vocab_size=c.vocab_size,
            layers=getattr(c, "num_hidden_layers", 0),
            hidden=c.hidden_size,
            heads=heads,
            kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0),
            intermediate=_first_int(c, "intermediate_size", "ffn_dim", default=4 * c.hidden_size),
            tied=head is not None and head.weight is outline.get_input_embeddings().weight,
            max_positions=_first_int(c, "max_position_embeddings", "n_positions", default=UNBOUNDED),
            parameters=sum(p.numel() for p in parameters.values()),
            operations=(),
            dtype=folder.dtype,
            limits=LIMITS,
        )

    @hookimpl
    def build(self, shape: Shape, ops: Ops) -> Module:
        from nanovllm_models.any_module import Foreign

        return Foreign(_build(self._folder().path), ops, _names(self._outline()), self.path)

    @hookimpl
    def weight(self, shape: Shape, name: str, seed: int) -> Tensor:
        """The parameter as stored, in the stored dtype."""
        return self._folder().tensor(self._stored(name))

    @hookimpl
    def config(self, shape: Shape) -> dict[str, Any]:
        return dict(self._folder().config)

    def _folder(self) -> ModelFolder:
        folder = open_model(self.path)
        assert isinstance(folder, ModelFolder), "probe refuses GGUF files"
        return folder

    def _outline(self) -> Any:
        folder = self._folder()
        return _outline(folder.path, str(folder.config))

    def _stored(self, name: str) -> str:
        """The stored tensor of a parameter: by its name, without the base model's prefix, or as the one it is tied to."""
        held, outline = set(self._folder().names()), self._outline()
        names = _names(outline)
        tied = {names[n]: p for n, p in outline.named_parameters(remove_duplicate=False)}
        if name not in tied:
            raise ModelError(f"{self.path}: this model has no parameter {name!r}{nearest(name, tied)}")
        same = (n for n, p in tied.items() if p is tied[name] and n != name)
        for candidate in (name, name.removeprefix(f"{outline.base_model_prefix}."), *same):
            if candidate in held:
                return candidate
        raise ModelError(
            f"{self.path}: holds no tensor {name!r}{nearest(name, held)}. Architectures whose tensors transformers stores "
            "in another form than it runs them (such as mixtures of experts) are not supported"
        )


def _class_name(config: Mapping[str, Any]) -> str:
    """The class of a configuration. Raises ModelError when there is none here, or using it would run foreign code."""
    KNOWN = literal("transformers", "models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        own = " Its own code (auto_map) would have to be run, which is never done." if config.get("auto_map") else ""
        hint = nearest(kind, KNOWN) if isinstance(kind, str) else ""
        raise ModelError(f"config.json: model_type {kind!r} is no causal language model of transformers{hint}.{own}")
    if config.get("quantization_config"):
        raise ModelError("config.json asks for quantization_config (quantised weights); take the original model")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"config.json: {kind} is an encoder and decoder (is_encoder_decoder), not a causal model")
    for key in LAYERS_NAMED:
        if isinstance(count := config.get(key), int) and count > LAYERS:
            raise ModelError(f"config.json: {key} is {str(count)[:24]}, expected at most {LAYERS:,}")
    name = KNOWN[kind]
    return name if isinstance(name, str) else str(name[0])


def _first_int(config: Any, *names: str, default: int) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), default)


@lru_cache(maxsize=2)
def _outline(folder: Any, config: str) -> Any:
    """The model on meta, for its names and shapes."""
    import torch

    with torch.device("meta"):
        return _instance(folder)


def _names(model: Any) -> dict[str, str]:
    """Name in the module -> name in a model folder, which transformers keeps apart for some architectures."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(p): name for name, p in revert_weight_conversion(model, parameters).items() if p is not None}
    alike = Counter(id(p) for p in parameters.values())  # tied parameters keep their own names
    return {name: stored.get(id(p), name) if alike[id(p)] == 1 else name for name, p in parameters.items()}


def _build(folder: Any) -> nn.Module:
    """The model with parameters on meta and buffers computed, as its constructor makes them."""
    import torch
    from torch import nn
    from transformers.initialization import no_init_weights

    with torch.device("cpu"), no_init_weights():
        model = _instance(folder)
        model.tie_weights()
    moved: dict[int, nn.Parameter] = {}
    for owner in model.modules():
        for key, p in owner._parameters.items():
            if p is not None:
                empty = moved.get(id(p))
                if empty is None:
                    empty = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                    moved[id(p)] = empty
                owner._parameters[key] = empty
    return model


def _instance(folder: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as e:  # of which kind, for sizes that make no sense, is up to each architecture's code
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ModelError(f"{resolve(str(folder))}: transformers cannot make this model ({lines[0]})") from e
