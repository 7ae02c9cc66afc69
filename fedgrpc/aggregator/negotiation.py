"""In which recipes each worker's models and updates travel: what the run prefers, what they list, their links.

    upload      Task.upload_recipe      a recipe
    download    Task.download_recipe    WHOLE, or WHOLE~DIFFERENCE where the difference to what is held has another

The rule: nothing is assumed of a worker. It is told recipes of encodings that it has listed, and refused where
there is none. How fast its link is its own transfers have told, or it has declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fedgrpc.aggregator.model_store import Downlink
from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.cast import Cast
from fedgrpc.codec.encoding import Encoding
from fedgrpc.codec.preference import Capabilities, Preferences, parse_preferences
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.uniform import Uniform
from fedgrpc.errors import UsageError
from fedgrpc.v1.aggregator_pb2 import RegisterRequest, WorkerRecord
from fedgrpc.v1.tensor_pb2 import COMPRESSION_ZSTD

AUTO = "auto"
AUTO_UPLOAD = "entropy:c=8+zstd below 2mbit | entropy:c=3+zstd below 20mbit | int8+zstd | int8 | raw"
AUTO_DOWNLOAD = "int8+zstd | int8 | raw"
AUTO_DIFFERENCE = "entropy:c=1+zstd below 20mbit | int8+zstd | int8 | raw"
_DIFFERENCE = "~"
_LEAST_BITS = 8
RAW = Recipe.parse("raw")


@dataclass(frozen=True)
class Link:
    """Bytes a second up and down; None: nobody knows."""

    up: float | None
    down: float | None


@dataclass(frozen=True)
class Agreed:
    """The recipes of one worker."""

    downlink: Downlink
    upload: Recipe

    @property
    def download_text(self) -> str:
        """As in `Task.download_recipe`."""
        return text_of(self.downlink)


def link_of(worker: Worker) -> Link:
    """By what went through it, else by what the worker declares."""
    device, history = worker.registration.device, worker.history
    return Link(
        history.uplink.bytes_per_second or device.uplink_bits_per_second / 8 or None,
        history.downlink.bytes_per_second or device.downlink_bits_per_second / 8 or None,
    )


def text_of(downlink: Downlink) -> str:
    """A downlink in one word; the difference is left out where the recipe of the whole model says it, too."""
    if downlink == _downlink(downlink.whole, downlink.whole):
        return str(downlink.whole)
    return f"{downlink.whole}{_DIFFERENCE}{downlink.difference or RAW}"


@lru_cache(maxsize=64)
def full_text(recipe: str) -> str:
    """A recipe, or a downlink in one word, as a worker is told it: with every key."""
    whole, *difference = recipe.split(_DIFFERENCE, 1)
    return _DIFFERENCE.join(Recipe.parse(text).full_text for text in (whole, *difference))


class Negotiation:
    """The preferences of one run, each as `parse_preferences` reads it, or "auto".

    Raises UsageError for one that cannot be, and for a difference that may lose more than there is.
    """

    def __init__(self, download: str, difference: str | None, upload: str) -> None:
        self._upload = _preferences(upload, AUTO_UPLOAD)
        self._whole = _preferences(download, AUTO_DOWNLOAD)
        if difference is None and download.strip() == AUTO:
            difference = AUTO
        self._difference = None if difference is None else _preferences(difference, AUTO_DIFFERENCE)
        self.downlinks = tuple(dict.fromkeys(self._downlinks()))
        # Of the recipe of whole models alone the first downlink is the one.
        self._downlink_of: dict[str, Downlink] = {}
        for downlink in self.downlinks:
            self._downlink_of[text_of(downlink)] = self._downlink_of[full_text(text_of(downlink))] = downlink
        for downlink in self.downlinks:
            for text in (str(downlink.whole), downlink.whole.full_text):
                self._downlink_of.setdefault(text, downlink)
        for recipe in self._difference.recipes if self._difference else ():
            if not recipe.contractive:
                raise UsageError(
                    f"difference_recipe '{recipe}' may lose more than there is: errors would grow; "
                    "take a finer one, such as entropy:c=1+zstd"
                )
        for downlink in self.downlinks:
            if any(recipe is not None and recipe.budget for recipe in (downlink.whole, downlink.difference)):
                raise UsageError("a budget is for updates: a model is encoded once for everybody")
        for recipe in self._whole.recipes:
            if not all(map(_is_fine, recipe.encodings)):
                raise UsageError(
                    f"'{recipe}' is too coarse for whole models: nothing makes good what they lose. "
                    f"Use it for updates, as in --upload-encoding '{recipe}' --download-encoding int8+zstd"
                )

    def _downlinks(self) -> Iterator[Downlink]:
        """All that may be agreed on."""
        for whole in self._whole.recipes:
            for difference in (whole,) if self._difference is None else self._difference.recipes:
                yield _downlink(whole, difference)

    def check(self, registration: RegisterRequest) -> None:
        """Raise UsageError where this run has no recipe that the worker knows."""
        known = _known(registration)
        for preferences, what in (
            (self._whole, "models"),
            (self._difference, "models"),
            (self._upload, "updates"),
        ):
            if preferences is not None and preferences.choose(known, None) is None:
                recipes = " | ".join(str(recipe) for recipe in preferences.recipes)
                raise UsageError(
                    f"worker {registration.worker!r} knows no encoding of this run's {what}, {recipes}; "
                    f"it lists {known}"
                )

    def agreed(self, worker: Worker) -> Agreed:
        """What a worker is told. Raises UsageError as `check`."""
        self.check(worker.registration)
        known, link = _known(worker.registration), link_of(worker)
        up, down = (None if rate is None else 8 * rate for rate in (link.up, link.down))
        upload, whole = self._upload.choose(known, up), self._whole.choose(known, down)
        difference = whole if self._difference is None else self._difference.choose(known, down)
        assert upload is not None
        assert whole is not None
        assert difference is not None
        return Agreed(_downlink(whole, difference), upload)

    def tell(self, worker: Worker, record: WorkerRecord) -> None:
        """Fill in what operators see of it."""
        link = link_of(worker)
        record.uplink_bytes_per_second, record.downlink_bytes_per_second = link.up or 0.0, link.down or 0.0
        try:
            agreed = self.agreed(worker)
        except UsageError:
            # It registered when this run had other encodings, and has not been back.
            return
        record.download_recipe, record.upload_recipe = str(agreed.downlink.whole), str(agreed.upload)
        record.difference_recipe = str(agreed.downlink.difference or RAW)

    def downlink_of(self, text: str) -> Downlink | None:
        """The downlink that a worker was told as `text`; None: no worker is told so."""
        return self._downlink_of.get(text)


def _is_fine(encoding: Encoding) -> bool:
    """Whether a whole model in this encoding is still the model: no coarser than int8."""
    if isinstance(encoding, Uniform):
        return encoding.bits >= _LEAST_BITS
    return encoding.lossless or isinstance(encoding, Cast)


def _preferences(text: str, auto: str) -> Preferences:
    return parse_preferences(auto if text.strip() == AUTO else text)


def _downlink(whole: Recipe, difference: Recipe) -> Downlink:
    """A difference that loses nothing is no smaller than the model."""
    return Downlink(whole, None if difference.lossless or not difference.contractive else difference)


def _known(registration: RegisterRequest) -> Capabilities:
    return _listed(tuple(registration.encodings), COMPRESSION_ZSTD in registration.compressions)


@lru_cache(maxsize=256)
def _listed(encodings: tuple[str, ...], zstd: bool) -> Capabilities:
    """A fleet of thousands lists the same again and again."""
    return Capabilities.listed(encodings, ["zstd"] if zstd else [])
