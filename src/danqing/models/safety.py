"""A safety checker: an image classifier from local files, whose unsafe labels refuse a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointIncompleteError, UnknownModelError
from danqing.models.config_tables import CODE_KEYS, QUANTIZATION_KEYS
from danqing.weights.json_file import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.generation import Picture

UNSAFE_LABELS = (
    "nsfw",
    "porn",
    "hentai",
    "sexy",
    "unsafe",
    "explicit",
    "sexual",
    "gore",
    "violence",
)
THRESHOLD = 0.5


class SafetyChecker:
    """Any image classifier that transformers knows and whose labels say what is unsafe."""

    def __init__(self, place: Path) -> None:
        """Read it; it stays on the CPU, in float32.

        Raises:
            CheckpointIncompleteError: files are missing.
            UnknownModelError: it is no image classifier, or none of its labels says unsafe.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if not (place / "config.json").is_file():
            raise CheckpointIncompleteError(
                "there is no safety checker", seen=place, allowed="a folder with config.json"
            )
        _refuse_code_keys(place)
        try:
            self._prepare: Any = AutoImageProcessor.from_pretrained(
                place, local_files_only=True, trust_remote_code=False, use_fast=False
            )
            self._model: Any = AutoModelForImageClassification.from_pretrained(
                place, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                attn_implementation="eager",
            ).eval()  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise UnknownModelError(
                "the safety checker cannot be used", seen=f"{place}: {str(error)[:300]}"
            ) from error
        labels = {int(i): str(label) for i, label in self._model.config.id2label.items()}
        self._unsafe = {i: t for i, t in labels.items() if _is_unsafe(t)}
        if not self._unsafe:
            raise UnknownModelError(
                "none of the safety checker's labels says what is unsafe",
                seen=", ".join(labels.values())[:200],
                allowed=", ".join(UNSAFE_LABELS),
            )
        self.name = place.name

    def refuses(self, picture: Picture) -> str | None:
        """Return label and probability of what a picture is refused for, or None."""
        import torch

        inputs = self._prepare(images=picture.image, return_tensors="pt")
        with torch.inference_mode():
            odds = self._model(**inputs).logits.softmax(-1)[0]
        found = max(self._unsafe, key=lambda i: float(odds[i]))
        together = sum(float(odds[i]) for i in self._unsafe)
        return f"{self._unsafe[found]}, {together:.2f}" if together >= THRESHOLD else None


def _refuse_code_keys(place: Path) -> None:
    """Refuse a config that would choose code or a kernel: its architecture is not danqing's.

    Raises:
        UnknownModelError: naming the key.
        CheckpointDamagedError: a config cannot be read.
    """
    for name in ("config.json", "preprocessor_config.json"):
        if not (place / name).is_file():
            continue
        for key in read_json(place / name):
            if key in CODE_KEYS or key in QUANTIZATION_KEYS:
                raise UnknownModelError(
                    "the safety checker's config asks for code or kernels of its own",
                    seen=f"{place / name}: {key}",
                    allowed="a classifier of transformers itself, not quantized",
                )


def _is_unsafe(label: str) -> bool:
    words = label.lower().replace("-", "_").split("_")
    return (
        "not" not in words and "non" not in words and any(word in UNSAFE_LABELS for word in words)
    )
