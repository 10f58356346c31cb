"""Kinds: the networks and small files that models are made of, and how each is recognised.

One row a kind. A network is recognised by tensors that only its kind has, under each style of
names that people's files use; a tokenizer by its files. Which kinds make a model, and what each is
called there, is the family's business (`danqing.models.slots`). Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

Config = Literal["required", "optional", "none"]
"""Of a style of names: whether config.json beside the weights says what shapes do not."""

RELEASED = "bfl"
"""Style of a release's own files; they win over copies of the same network beside them."""
FILES = "files"
"""Style of components without tensors."""
FOREIGN = "foreign"
"""Style of networks that are recognised only to be refused by name."""
DENOISER_FOLDERS = ("transformer", "unet")
"""Names of the denoiser's folder in a diffusers folder."""
RELEASED_FOLDERS = ("transformer", "vae")
"""Folders of the networks that a BFL release has as files; without a model_index.json, they make a
diffusers folder."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """One style of names for a kind's tensors.

    Attributes:
        style: whose names: `diffusers`, `transformers`, `bfl`, `llama.cpp`, ...
        telltales: tensors that together only such a network has.
        config: whether its config.json is needed.
    """

    style: str
    telltales: tuple[str, ...]
    config: Config = "none"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of network or of small files.

    Attributes:
        name: as slots name it.
        title: as people know it; of a foreign denoiser, the model's name.
        namings: styles of names; empty of small files.
        alias: short name accepted by `--component` where it means one component of the family.
        prefixes: what tools put before the names, where several networks share a file.
        model_types: `model_type` of its config.
        denoiser: whether it is what a model is recognised by.
        tokenizer: kind of the tokenizer that may lie in its folder.
        files: files that only a tokenizer of this kind has.
        vocabulary: type of the model in its tokenizer.json.
        config_file: file that makes a folder one of this kind, of small files without tensors.
        source: where to get its files, in words.
        classes: beginnings of its classes' names in a model_index.json.
    """

    name: str
    title: str
    namings: tuple[Naming, ...] = ()
    alias: str = ""
    prefixes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    denoiser: bool = False
    tokenizer: str = ""
    files: tuple[str, ...] = ()
    vocabulary: str = ""
    config_file: str = ""
    source: str = ""
    classes: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name shown to people and accepted by `--component`."""
        return self.alias or self.name


def _diffusers(*telltales: str) -> Naming:
    return Naming(style="diffusers", telltales=telltales, config="required")


def _transformers(*telltales: str) -> Naming:
    return Naming(style="transformers", telltales=telltales, config="required")


DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.")
_CLIP_PREFIXES = (
    "text_encoders.clip_l.transformer.", "text_encoders.clip_l.",
    "text_encoders.clip_g.transformer.", "text_encoders.clip_g.",
)  # fmt: skip
_BPE = ("vocab.json", "merges.txt")

_KNOWN = (
    Kind(
        name="flux_transformer", title="FLUX.1 transformer", alias="dit",
        denoiser=True, prefixes=DENOISER_PREFIXES,
        namings=(
            Naming(
                style="bfl",
                telltales=(
                    "img_in.weight", "double_blocks.0.img_attn.qkv.weight",
                    "single_blocks.0.linear1.weight",
                ),
            ),
            _diffusers(
                "x_embedder.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "transformer_blocks.0.norm1.linear.weight",
                "single_transformer_blocks.0.proj_mlp.weight",
                "time_text_embed.text_embedder.linear_1.weight",
            ),
        ),
    ),
    Kind(
        name="sd3_transformer", title="SD3 transformer", alias="dit",
        denoiser=True, prefixes=DENOISER_PREFIXES,
        namings=(
            _diffusers(
                "pos_embed.proj.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "norm_out.linear.weight",
            ),
        ),
    ),
    Kind(
        name="kl", title="KL autoencoder", alias="vae",
        prefixes=("vae.", "first_stage_model."),
        namings=(
            Naming(
                style="bfl",
                telltales=("decoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight"),
            ),
            _diffusers("decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"),
        ),
    ),
    Kind(
        name="t5", title="T5 encoder", alias="t5",
        prefixes=_T5_PREFIXES, model_types=("t5",), tokenizer="t5_tokenizer",
        namings=(
            _transformers("encoder.block.0.layer.0.SelfAttention.q.weight"),
            Naming(
                style="llama.cpp",
                telltales=("enc.blk.0.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight"),
            ),
        ),
    ),
    Kind(
        name="clip", title="CLIP text encoder", alias="clip",
        prefixes=_CLIP_PREFIXES, model_types=("clip", "clip_text_model"),
        tokenizer="clip_tokenizer",
        namings=(
            _transformers("text_model.embeddings.token_embedding.weight"),
            _transformers("embeddings.token_embedding.weight"),
        ),
    ),
    Kind(
        name="qwen_vl", title="Qwen2.5-VL", alias="qwen",
        model_types=("qwen2_5_vl",), tokenizer="qwen2_tokenizer",
        namings=(
            _transformers(
                "model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"
            ),
            _transformers(
                "model.language_model.layers.0.self_attn.q_proj.weight",
                "model.visual.blocks.0.attn.qkv.weight",
            ),
        ),
    ),
    Kind(
        name="deepgen_connector", title="DeepGen's connector", alias="connector",
        namings=(
            Naming(
                style="deepgen",
                telltales=("meta_queries", "projector_1.weight", "projector_3.weight"),
                config="optional",
            ),
        ),
    ),
    Kind(
        name="t5_tokenizer", title="T5's tokenizer", alias="t5_tokenizer",
        files=("spiece.model",), vocabulary="Unigram",
        source="of google/t5-v1_1-xxl, or of the model's own repository",
    ),
    Kind(
        name="clip_tokenizer", title="CLIP's tokenizer", alias="clip_tokenizer",
        files=_BPE, vocabulary="BPE",
        source="of openai/clip-vit-large-patch14, or of the model's own repository",
    ),
    Kind(
        name="qwen2_tokenizer", title="Qwen2's tokenizer", alias="qwen_tokenizer",
        files=_BPE, vocabulary="BPE",
        source="of Qwen/Qwen2.5-VL-3B-Instruct, or of the model's own repository",
    ),
    Kind(
        name="flow_match_euler", title="noise schedule", alias="schedule",
        config_file="scheduler_config.json",
    ),
)  # fmt: skip


def _foreign(title: str, classes: Iterable[str], *namings: tuple[str, ...]) -> Kind:
    """Return a row for a denoiser that is recognised to be refused by its name."""
    return Kind(
        name=f"{title} denoiser",
        title=title,
        alias="dit",
        denoiser=True,
        prefixes=DENOISER_PREFIXES,
        classes=tuple(classes),
        namings=tuple(Naming(style=FOREIGN, telltales=row) for row in namings),
    )


_UNET = ("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight")
_FOREIGN = (
    _foreign(
        "FLUX.2", ["Flux2"], ("double_stream_modulation_img.lin.weight",),
        ("double_stream_modulation_img.linear.weight",),
    ),
    _foreign(
        "FLUX.3", ["Flux3"], ("early_stream_modulations.image.lin.weight",),
        ("early_stream_modulations.image.linear.weight",),
    ),
    _foreign("Chroma", ["Chroma"], ("distilled_guidance_layer.in_proj.weight",)),
    _foreign(
        "Z-Image", ["ZImage"], ("cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight")
    ),
    _foreign(
        "Lumina 2", ["Lumina2"],
        ("cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"),
        ("time_caption_embed.caption_embedder.0.weight", "layers.0.attn.to_q.weight"),
    ),
    _foreign("Qwen-Image 2.1", ["QwenImage21"], ("txt_in.text_norm.weight",)),
    _foreign(
        "Qwen-Image", ["QwenImage"], ("txt_norm.weight", "transformer_blocks.0.txt_mod.1.weight")
    ),
    _foreign(
        "Stable Diffusion XL", ["StableDiffusionXL"],
        ("input_blocks.0.0.weight", "label_emb.0.0.weight"),
        ("add_embedding.linear_1.weight", *_UNET),
    ),
    _foreign(
        "Stable Diffusion 1 or 2",
        ["StableDiffusionPipeline", "StableDiffusionInpaint", "StableDiffusionImg2Img"],
        ("input_blocks.0.0.weight", "out.2.weight"),
        ("time_embedding.linear_1.weight", *_UNET),
    ),
    _foreign(
        "Stable Diffusion 3 under Stability AI's names", [],
        ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"),
    ),
    _foreign(
        "Stable Cascade", ["StableCascade"], ("clf.1.weight", "clip_txt_pooled_mapper.weight")
    ),
    _foreign(
        "Sana", ["Sana"], ("attention_y_norm.weight", "blocks.0.cross_attn.q_linear.weight"),
        ("caption_norm.weight", "patch_embed.proj.weight"),
    ),
    _foreign(
        "PixArt", ["PixArt"],
        ("t_block.1.weight", "y_embedder.y_embedding", "blocks.0.cross_attn.kv_linear.weight"),
        (
            "adaln_single.linear.weight", "caption_projection.linear_1.weight",
            "pos_embed.proj.weight",
        ),
    ),
    _foreign(
        "Wan", ["Wan", "SkyReelsV2"],
        ("head.modulation", "patch_embedding.weight", "blocks.0.self_attn.q.weight"),
        ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
    ),
    _foreign(
        "HunyuanDiT", ["HunyuanDiT"], ("mlp_t5.0.weight", "pooler.positional_embedding"),
        ("time_extra_emb.pooler.positional_embedding",),
    ),
    _foreign(
        "HunyuanVideo or HunyuanImage", ["HunyuanVideo", "HunyuanImage"],
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight",),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
    ),
    _foreign(
        "LTX-Video", ["LTX"], ("patchify_proj.weight", "adaln_single.linear.weight"),
        ("proj_in.weight", "caption_projection.linear_1.weight", "time_embed.linear.weight"),
    ),
    _foreign(
        "AuraFlow", ["AuraFlow"], ("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight"),
        ("joint_transformer_blocks.0.attn.add_q_proj.weight",),
    ),
    _foreign(
        "HiDream", ["HiDream"], ("double_stream_blocks.0.block.adaLN_modulation.1.weight",)
    ),
    _foreign(
        "CogVideoX", ["CogVideoX"], ("patch_embed.text_proj.weight", "norm_final.weight")
    ),
    _foreign(
        "CogView", ["CogView"],
        ("patch_embed.text_proj.weight", "time_condition_embed.condition_embedder.linear_1.weight"),
    ),
    _foreign(
        "Mochi", ["Mochi"], ("t5_yproj.weight",), ("time_embed.caption_proj.weight",)
    ),
    _foreign("ERNIE-Image", ["ErnieImage"], ("layers.0.adaLN_mlp_ln.weight",)),
    _foreign(
        "Krea 2", ["Krea2"], ("txtfusion.projector.weight",), ("text_fusion.projector.weight",)
    ),
    _foreign(
        "Kandinsky", ["Kandinsky"], ("text_transformer_blocks.0.self_attention.to_query.weight",)
    ),
    _foreign("Ideogram", ["Ideogram"], ("llm_cond_proj.weight", "adaln_proj.weight")),
    _foreign("Ovis-Image", ["OvisImage"], ("context_embedder_norm.weight",)),
    _foreign("GLM-Image", ["GlmImage"], ("glyph_projector.net.0.proj.weight",)),
    _foreign("OmniGen", ["OmniGen"], ("patch_embedding.input_image_proj.weight",)),
)  # fmt: skip
"""Denoisers no family has yet: telltales of the original release's names, then diffusers'.

Original names are those that diffusers' `single_file_utils.py` (0.42) and ComfyUI's
`model_detection.py` look for; diffusers' were read off its classes. A family that comes to have one
moves its row up.
"""

KINDS = {kind.name: kind for kind in (*_FOREIGN, *_KNOWN)}
"""By name. Those with more to tell come first: Chroma has all the names FLUX.1 is recognised by."""

PREFIXES = ("", *dict.fromkeys(prefix for kind in KINDS.values() for prefix in kind.prefixes))
"""What may stand before a component's names in a file; some begin with others, in this order."""

TOKENIZERS = {name: kind for name, kind in KINDS.items() if kind.vocabulary}
TOKENIZER_FILES = (
    "tokenizer.json", *dict.fromkeys(file for kind in TOKENIZERS.values() for file in kind.files),
)  # fmt: skip


def recognise(names: Container[str]) -> tuple[Kind, Naming] | None:
    """Return the kind and the style of names of a network; None if no row fits."""
    for kind in KINDS.values():
        for naming in kind.namings:
            if all(name in names for name in naming.telltales):
                return kind, naming
    return None


def kind_of_config(model_type: object) -> Kind | None:
    """Return the kind whose config has this `model_type`."""
    return next((kind for kind in KINDS.values() if model_type in kind.model_types), None)


def kind_of_classes(names: Iterable[str]) -> Kind | None:
    """Return the kind of denoiser that classes in a model_index.json belong to."""
    names = tuple(names)
    return next(
        (
            kind
            for kind in KINDS.values()
            if kind.classes and any(name.startswith(kind.classes) for name in names)
        ),
        None,
    )
