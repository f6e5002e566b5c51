"""KV-cache policies for vLLM and SGLang: one file a method, the same line in both engines.

    >>> import kvplug
    >>> str(kvplug.parse("quest(budget=1024)"))
    'quest(budget=1024, dense_layers=2)'

This package knows no engine. ``kvplug_vllm`` and ``kvplug_sglang`` translate.
"""

from kvplug.accounting import (
    Labels,
    StepReads,
    byte_share,
    dense_reads,
    digest_bytes,
    reads_by_policy,
    step_reads,
)
from kvplug.batch import BatchPlanner, Choices, LayerReads, Observed
from kvplug.composition import Composition
from kvplug.compress import (
    HeadBudgets,
    LayerBudgets,
    LocalLayers,
    PositionalEviction,
    PromptKV,
    ScoredEviction,
)
from kvplug.config import Settings, read_settings
from kvplug.eviction import keep_tokens, window_queries
from kvplug.formats import KeyCodes, PageFormat
from kvplug.generate import (
    BlockSelector,
    LastQueries,
    PositionalPrefill,
    QueryBlocks,
    SparsePrefill,
)
from kvplug.grammar import parse
from kvplug.load import Selector, TokenSelector
from kvplug.offer import Offer, Refused, read_offer
from kvplug.placement import Placement
from kvplug.plan import Planner
from kvplug.policy import Action, Digest, Evidence, Granularity, Policy, Sharing, Stage
from kvplug.registry import policy_class, policy_names
from kvplug.reuse import Arrangement, ChunkReuse, arrange, rearranged
from kvplug.rotation import Rotation, turn
from kvplug.schedule import Course, Event, Schedule
from kvplug.segments import Segments
from kvplug.selection import (
    Asking,
    Blocks,
    block_bytes,
    blocks_of,
    choose_pages,
    choose_units,
    logits_bytes,
)

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Arrangement",
    "Asking",
    "BatchPlanner",
    "BlockSelector",
    "Blocks",
    "Choices",
    "ChunkReuse",
    "Composition",
    "Course",
    "Digest",
    "Event",
    "Evidence",
    "Granularity",
    "HeadBudgets",
    "KeyCodes",
    "Labels",
    "LastQueries",
    "LayerBudgets",
    "LayerReads",
    "LocalLayers",
    "Observed",
    "Offer",
    "PageFormat",
    "Placement",
    "Planner",
    "Policy",
    "PositionalEviction",
    "PositionalPrefill",
    "PromptKV",
    "QueryBlocks",
    "Refused",
    "Rotation",
    "Schedule",
    "ScoredEviction",
    "Segments",
    "Selector",
    "Settings",
    "Sharing",
    "SparsePrefill",
    "Stage",
    "StepReads",
    "TokenSelector",
    "arrange",
    "block_bytes",
    "blocks_of",
    "byte_share",
    "choose_pages",
    "choose_units",
    "dense_reads",
    "digest_bytes",
    "keep_tokens",
    "logits_bytes",
    "parse",
    "policy_class",
    "policy_names",
    "read_offer",
    "read_settings",
    "reads_by_policy",
    "rearranged",
    "step_reads",
    "turn",
    "window_queries",
]
