"""CompressedCache: the transformers cache that holds all state of a compressed generation."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.config import CompressionConfig
from asymkv.dimensions import Projection
from asymkv.layer import CompressedLayer
from asymkv.ledger import GENERATED, PROMPT, BudgetLedger, cache_shape
from asymkv.models import get_adapter
from asymkv.models._compat import Cache, columns_to_crop
from asymkv.ops import resolve_backend
from asymkv.provenance import files_read
from asymkv.rope import ProjectedRope, Rope

if TYPE_CHECKING:
    from asymkv.step import Step


class CompressedCache(BudgetLedger, Cache):
    """A key/value cache that a method keeps within its budget.

    Args:
        config: the settings.
        num_layers: layers of the model.
        kv_heads: KV heads per layer.
        head_dim: size of a key.
        dtype: of keys and values (for byte budgets).
        rope: the model's rotary embedding.
        heads: query heads per layer (for byte budgets; 0 = queries are not counted).
        projections: of every layer, where rows are stored in fewer dimensions; none = as they are.
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: CompressionConfig,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        rope: Rope,
        heads: int = 0,
        projections: Sequence[Projection] = (),
    ) -> None:
        policy, low = config.positions, config.keeps_low_keys(dtype)
        super().__init__(layers=[CompressedLayer(i, policy, low) for i in range(num_layers)])
        self.config = config
        self.head_split = config.head_split
        self.layer_tokens: tuple[int, ...] | None = None
        self.sliding_window: int | None = None
        self.projections = list(projections)
        self.files: dict[str, str] = {}  # what was measured of the model and read for this cache: sha256
        projected = any(p.keys is not None for p in projections)
        self.rope = ProjectedRope(rope.rotary) if projected else rope
        widths = [p.widths(head_dim) for p in projections] or [(head_dim, head_dim)] * num_layers
        self.shape = cache_shape(config, kv_heads, widths, dtype, heads)
        self.backend = resolve_backend(config.backend, rope.device, head_dim, dtype, widths)
        self.step: Step | None = None
        self.open_ledger()
        self.tail = torch.zeros(0, 0, dtype=torch.int8)  # columns since the last compaction, see ledger.PROMPT
        self.compactions = 0
        self.peak_rows = 0
        self.peak_nbytes = 0
        self._bytes: list[int] = [0] * num_layers
        self.in_call = False  # a forward has begun and not ended
        self.branches: Sequence[CompressedCache] = ()  # share this forward (asymkv.branches)
        self.dialogue = ""  # where a conversation stands (asymkv.ask); "" = none
        self._model: Callable[[], PreTrainedModel | None] = lambda: None

    @classmethod
    def for_model(cls, config: CompressionConfig, model: PreTrainedModel) -> CompressedCache:
        """An empty cache for a causal LM.

        Raises:
            ValueError: for a model that a compressed cache cannot serve, or whose head scores, stages, gate or basis
                are missing.
        """
        adapter = get_adapter(model.config.model_type)
        adapter.check(model.config)
        rotary = adapter.rotary(model)
        if not hasattr(rotary, "inv_freq"):
            raise ValueError(f"{type(model).__name__}: no rotary embedding; compressed caches need RoPE")
        heads = model.config.num_attention_heads
        with files_read() as files:
            cache = cls(
                config,
                num_layers=model.config.num_hidden_layers,
                kv_heads=getattr(model.config, "num_key_value_heads", None) or heads,
                head_dim=getattr(model.config, "head_dim", None) or model.config.hidden_size // heads,
                dtype=model.dtype,
                rope=Rope(rotary),
                heads=heads,
                projections=config.row_dimensions.prepare(model) if config.row_dimensions else (),
            )
            cache.sliding_window = adapter.sliding_window(model.config)
            cache.check_length(0)
            cache.head_split = config.head_split.prepare(model)
            cache.layer_tokens = config.options.layer_tokens(model)
            config.options.prepare_layers(model, cache.layers)
        cache.files = files
        cache._model = weakref.ref(model)
        return cache

    # -- introspection -------------------------------------------------------------------------------------------
    @property
    def tokens_seen(self) -> Tensor:
        """``[B]`` int64: own tokens of each row, padding not counted."""
        return torch.tensor(self.layers[0].tokens, dtype=torch.int64)

    def num_rows(self, layer: int) -> Tensor:
        """``[B, H_kv]`` int64: rows that a layer stores."""
        found = self._layer(layer)
        return torch.tensor(found.storage.length).view(found.batch, -1)

    def keys(self, layer: int) -> list[list[Tensor]]:
        """Per row of the batch, per KV head: keys after RoPE ``[n, D]``, rows by ascending position.

        With ``dimensions``, keys and values are in the coordinates that are stored.
        """
        return self._rows(layer, "keys")

    def values(self, layer: int) -> list[list[Tensor]]:
        """Per row, per KV head: values ``[n, D]``, means of the members of each row."""
        return self._rows(layer, "values")

    def cardinality(self, layer: int) -> list[list[Tensor]]:
        """Per row, per KV head: tokens that each row stands for, ``[n]`` int64."""
        return [[x.long() for x in row] for row in self._rows(layer, "cardinality")]

    def positions(self, layer: int) -> list[list[Tensor]]:
        """Per row, per KV head: position of each row's last member in the row's own tokens, ``[n]`` int64."""
        return [[x.long() for x in row] for row in self._rows(layer, "position")]

    def _layer(self, index: int) -> CompressedLayer:
        if not self.layers[index].is_initialized:
            raise ValueError(f"layer {index} of this cache holds no rows yet")
        return self.layers[index]

    def _rows(self, index: int, name: str) -> list[list[Tensor]]:
        layer = self._layer(index)
        heads = layer.kv_heads
        return [[layer.storage.rows(name, b * heads + h).clone() for h in range(heads)] for b in range(layer.batch)]

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer that this cache owns, spare rows and statistics included."""
        return sum(layer.nbytes for layer in self.layers) + self.tail.untyped_storage().nbytes()

    def max_rows(self) -> int:
        """Rows of the longest head of any layer."""
        return max((layer.storage.width for layer in self.layers if layer.is_initialized), default=0)

    def stats(self) -> dict[str, Any]:
        """What was seen, what is stored, and how it was done, measured from the buffers."""
        ready = [layer for layer in self.layers if layer.is_initialized]
        stored = sum(sum(layer.storage.length) for layer in ready)
        seen = sum(sum(layer.tokens) * layer.kv_heads for layer in ready)
        budget, raised = self.budget_rows() if self.prompt_tokens else ([], [])
        return {
            "method": self.config.method,
            "tokens_seen": self.tokens_seen.tolist(),
            "rows": stored,
            "max_rows": self.max_rows(),
            "nbytes": self.nbytes,
            "kept_ratio": stored / seen if seen else 1.0,
            "represented_tokens": sum(_total_cardinality(layer) for layer in ready),
            "compactions": self.compactions,
            "backend": self.backend,
            "budget": budget,
            "budget_raised": raised,
            "peak_rows": self.peak_rows,
            "peak_nbytes": self.peak_nbytes,
            "basis_nbytes": sum(p.nbytes for p in self.projections),
        }

    @property
    def max_cache_len(self) -> int:
        """Asked for by PEFT where it is about to put a cache of its own, the full one, in this one's place."""
        raise AttributeError("a compressed cache has no max_cache_len. PEFT's prefix tuning asks for it, to run on a "
                             "cache of its own; allowed: LoRA, prompt tuning, or restore() the patch")

    @property
    def is_croppable(self) -> bool:
        """Whether every past state can be restored: only if nothing was ever compacted away."""
        return not self.config.options.compresses

    def __repr__(self) -> str:
        seen, rows = self.tokens_seen.tolist(), self.max_rows()
        return f"CompressedCache({self.config.describe()}, tokens_seen={seen}, rows<={rows})"

    # -- one forward ---------------------------------------------------------------------------------------------
    def start_call(self, counts: list[int]) -> list[bool]:
        """Accounts for a forward of ``counts[b]`` new tokens per row, before its first chunk.

        Returns:
            Per row, whether these are prompt tokens (else one generated token): several at once, the first of a row,
            or part of an announced prompt.

        Raises:
            ValueError: for a batch of another size, or after a forward that never ended.
        """
        self.check_whole()
        self.call_prompt = self.count_prompt(counts)
        if not self.tail.shape[0]:
            self.tail = torch.zeros(len(counts), 0, dtype=torch.int8)
        self.in_call = True
        return self.call_prompt

    def check_whole(self) -> None:
        """Refuses a cache whose layers disagree.

        Raises:
            ValueError: after a forward that never ended.
        """
        if self.in_call:
            raise ValueError("the last forward on this cache was interrupted, so that its layers disagree; go on from "
                             "a fork() made before it, or reset()")

    def next_positions(
        self, counts: list[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Own-token positions ``[B, max(counts)]`` of the tokens that follow, and their tables ``cos, sin``."""
        seen = torch.tensor(self.layers[0].tokens or [0] * len(counts), device=device)[:, None]
        positions = seen + torch.arange(max(counts), device=device)
        # Clamped to each row's last token: frequencies that follow the length must not follow the batch's padding.
        own = positions.minimum(seen + torch.tensor(counts, device=device)[:, None] - 1).clamp(min=0)
        return positions, self.rope.tables(own, dtype) if positions.numel() else (positions, positions)

    def end_call(self, valid: Tensor, compacted: bool) -> None:
        """Counts the columns of a forward, ``valid [B, t]`` on the CPU, and remembers how far :meth:`crop` may go."""
        for layer in self.layers:
            layer.columns_seen += valid.shape[1]
        self.step, self.in_call = None, False
        kinds = valid * torch.tensor([[PROMPT if p else GENERATED] for p in self.call_prompt], dtype=torch.int8)
        self.tail = kinds[:, :0].clone() if compacted else torch.cat([self.tail, kinds], dim=1)
        self._measure_bytes()

    def measure(self, layer: CompressedLayer) -> None:
        """Updates the peaks after an append to one layer."""
        size = layer.nbytes
        if size != self._bytes[layer.index]:
            self._bytes[layer.index] = size
            self._measure_bytes()
        self.peak_rows = max(self.peak_rows, self.rows_that_share(layer, self.peak_rows))

    def _measure_bytes(self) -> None:
        self.peak_nbytes = max(self.peak_nbytes, sum(self._bytes) + self.tail.untyped_storage().nbytes())

    # -- batch and history ---------------------------------------------------------------------------------------
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest columns off again: ``crop(-n)``, n at most the columns since the last compaction.

        Attention mass that those tokens gave to other rows stays counted.

        Raises:
            ValueError: for a positive number, if a compaction lies between, or after a forward that never ended.
        """
        self.check_whole()
        count = columns_to_crop(tokens_to_remove, self.get_seq_length())
        if count < 0 or count > self.tail.shape[1]:
            raise ValueError(
                f"crop takes -n with n from 0 to the {self.tail.shape[1]} columns appended since the last compaction; "
                f"found {tokens_to_remove}; a fork() made before can be gone back to, and an assistant of assisted "
                "generation takes method='full'"
            )
        if count == 0:
            return
        left, cut = self.tail.split([self.tail.shape[1] - count, count], dim=1)
        removed = (cut > 0).sum(1).tolist()
        for layer in self.layers:
            layer.truncate(count, removed)
            if layer.ring is not None:
                layer.ring.take_back((cut == GENERATED).sum(1).tolist())
        self.uncount(cut, left)
        self.rope.follow(self.layers[0].tokens)
        self.forget_rows()
        self.tail = left.clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes row ``beam_idx[b]`` (beam search)."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch: indices, or bool ``[B]``.

        Raises:
            ValueError: for rows that the batch does not have; the cache stays as it was.
        """
        index, batch = torch.as_tensor(indices), len(self.prompt_tokens)
        if index.dtype == torch.bool:
            if batch and index.shape != (batch,):
                raise ValueError(f"a bool mask of the rows must be [{batch}], found {list(index.shape)}")
            index = index.nonzero().squeeze(-1)
        if batch and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < batch:
            raise ValueError(f"rows of a batch of {batch} are 0 to {batch - 1}; found {index.tolist()}")
        self.reorder_cache(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.reorder_cache(torch.arange(len(self.prompt_tokens)).repeat_interleave(repeats))

    def _select(self, rows: list[int]) -> None:
        for name in ("prompt_tokens", "pending", "expected_prompt", "prompt_until"):
            setattr(self, name, [getattr(self, name)[r] for r in rows] if getattr(self, name) else [])
        self.tail = self.tail[rows] if self.prompt_tokens else self.tail
        if self.rope.of_rows is not None:
            self.rope.of_rows = self.rope.of_rows[rows]
        self.forget_rows()
        self._bytes = [layer.nbytes for layer in self.layers]
        self._measure_bytes()

    def reset(self) -> None:
        """Forgets everything seen."""
        super().reset()
        self.step, self.in_call, self.dialogue = None, False, ""
        self.open_ledger()
        self.tail = torch.zeros(0, 0, dtype=torch.int8)
        self.compactions = self.peak_rows = self.peak_nbytes = 0
        self._bytes = [0] * len(self.layers)

    def fork(self) -> CompressedCache:
        """An independent copy: ask many questions on one compressed context."""
        out = copy.copy(self)
        out.layers = [layer.fork() for layer in self.layers]
        out.rope = copy.copy(self.rope)
        for name in ("prompt_tokens", "expected_prompt", "prompt_until", "pending", "_bytes"):
            setattr(out, name, list(getattr(self, name)))
        out.forget_rows()
        return out

    def __copy__(self) -> CompressedCache:
        out = type(self).__new__(type(self))
        out.__dict__.update(self.__dict__)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        return self.fork()

    def __reduce__(self) -> Any:
        raise TypeError("a CompressedCache is not pickled; write it with cache.save(folder), and read it with "
                        "CompressedCache.load(folder, model)")

    def prune(self, *, ratio: float | None = None, budget: int | str | None = None) -> CompressedCache:
        """A fork that is compacted to another ratio or budget by the scores that this cache stores.

        Rows that are gone stay gone: fill the cache with ``retain=True`` to try any ratio on one prefill.

        Raises:
            ValueError: for a cache without stored scores, or unless exactly one of ratio and budget is given.
        """
        from asymkv import reconstruction

        return reconstruction.prune(self, ratio, budget)

    def save(self, path: str | Path) -> None:
        """Writes the cache into a folder: rows as safetensors, settings, model and checksum as json.

        Raises:
            ValueError: if the model that filled the cache is gone.
        """
        from asymkv import serialize

        model = self._model()
        if model is None:
            raise ValueError("the model that filled this cache is gone; save while it is alive")
        serialize.save(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> CompressedCache:
        """A cache that :meth:`save` wrote, to go on with on the same model.

        Raises:
            ValueError: for a folder without a cache, a damaged file, or another model.
        """
        from asymkv import serialize

        return serialize.load(path, model)


def _total_cardinality(layer: CompressedLayer) -> int:
    return sum(int(layer.storage.rows("cardinality", h).sum()) for h in range(layer.storage.heads))
