# Types of the native core, csrc/bindings. tests/test_layers.py lists the packages that may import it.
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Priorities

_F32 = NDArray[np.float32]
_I32 = NDArray[np.int32]
_U8 = NDArray[np.uint8]

KEY_BLOCK: int

def compiler() -> str: ...
def crc32c(data: bytes | bytearray | memoryview | NDArray[Any], crc: int = 0) -> int: ...
def isa() -> str: ...
def system_page() -> int: ...
def usable_isas() -> str: ...
def use_isa(name: str) -> None: ...
def quantize(
    w: _F32,
    widths: Sequence[int],
    row_scales: Sequence[int],
    level_weights: _F32,
    squares: _F32,
    moments: _F32 | None,
    sweeps: int,
    thorough: bool,
    threads: int,
    rest: _F32 | None = None,
    corrected: int = 0,
) -> list[_U8]: ...
def read_f32(
    file: File, offset: int, shape: Sequence[int], crc: int, verify: bool, name: str
) -> _F32: ...
def memory_rate(bytes: int, threads: int) -> float: ...
def disk_rate(file: File, offsets: Sequence[int], length: int, num_readers: int) -> float: ...

class File:
    def __init__(self, path: str | bytes) -> None: ...
    def fileno(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_direct(self) -> bool: ...

class Arena:
    def __init__(self, bytes: int) -> None: ...

class Nested:
    @staticmethod
    def from_rungs(
        rungs: Sequence[_U8],
        rows: int,
        cols: int,
        widths: Sequence[int],
        scheme: str = "nested",
        row_scales: Sequence[int] = [1],
        ranks: Sequence[int] = [],
        basis: NDArray[np.int8] | None = None,
    ) -> Nested: ...
    @staticmethod
    def from_file(
        arena: Arena,
        file: File,
        offset: int,
        lengths: Sequence[int],
        crcs: Sequence[int],
        rows: int,
        cols: int,
        widths: Sequence[int],
        verify: bool,
        name: str,
        scheme: str = "nested",
        row_scales: Sequence[int] = [1],
        ranks: Sequence[int] = [],
    ) -> Nested: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def first(self, rungs: int) -> Nested: ...
    def share_basis(self, other: Nested) -> None: ...
    def decode_rows(self, ids: _I32, out: _F32, scale: float = 1.0) -> None: ...

class StoredRows:
    def __init__(
        self,
        file: File,
        offset: int,
        lengths: Sequence[int],
        crcs: Sequence[int],
        rows: int,
        cols: int,
        widths: Sequence[int],
        resident: Nested | None,
        verify: bool,
        name: str,
        scheme: str = "nested",
        row_scales: Sequence[int] = [1],
        ranks: Sequence[int] = [],
    ) -> None: ...
    @staticmethod
    def bytes_for(
        rows: int,
        cols: int,
        widths: Sequence[int],
        resident: int,
        scheme: str = "nested",
        row_scales: Sequence[int] = [1],
        ranks: Sequence[int] = [],
    ) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def decode_rows(self, ids: _I32, out: _F32, scale: float = 1.0) -> None: ...

class Workspace:
    def __init__(
        self,
        threads: int,
        max_rows: int,
        max_cols: int,
        max_hidden: int,
        max_context: int,
        head_dim: int,
        num_heads: int = 1,
    ) -> None: ...
    @staticmethod
    def bytes(
        threads: int,
        max_rows: int,
        max_cols: int,
        max_hidden: int,
        max_context: int,
        head_dim: int,
        num_heads: int = 1,
    ) -> int: ...
    def place(self, pos: int) -> None: ...
    def begin_noting(self) -> None: ...
    def end_noting(self) -> int: ...
    def repeat(self, noted: int) -> None: ...
    def forget(self, noted: int) -> None: ...
    @property
    def noted(self) -> int: ...

class Rope:
    def __init__(self, frequencies: _F32, scale: float) -> None: ...
    def keep(self, positions: int) -> None: ...
    @staticmethod
    def bytes(half: int, kept: int) -> int: ...
    def angles(self, pos: int, cos: _F32, sin: _F32) -> None: ...

class KvLayer:
    def __init__(
        self,
        *,
        key_type: str,
        value_type: str,
        num_heads: int,
        capacity: int,
        head_dim: int,
        resident: bool = False,
    ) -> None: ...
    def take(self, source: KvLayer, begin: int, end: int) -> None: ...
    @staticmethod
    def bytes(type: str, num_heads: int, capacity: int, head_dim: int) -> int: ...
    @staticmethod
    def ring(window: int, tokens: int) -> int: ...
    @staticmethod
    def latents(*, type: str, capacity: int, head_dim: int, value_dim: int) -> KvLayer: ...
    @property
    def content(self) -> _U8: ...

class LatentLayer:
    def __init__(
        self,
        *,
        index: int,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        scale: float,
        rotates: bool,
        grow_every: int,
        growth: float,
        norm: _F32,
        norm_eps: float,
    ) -> None: ...

class AttentionLayer:
    def __init__(
        self,
        *,
        index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        scale: float,
        q_bias: _F32 | None,
        k_bias: _F32 | None,
        v_bias: _F32 | None,
        q_norm: _F32 | None,
        k_norm: _F32 | None,
        norm_per_head: bool,
        norm_eps: float,
        clip: float,
        rope_dim: int | None = None,
        norm_after_rope: bool = False,
        k: Nested | None = None,
        input_norm: _F32 | None = None,
        sinks: _F32 | None = None,
        v_norm: bool = False,
        chunk: int = 0,
        growth: float = 0.0,
        grow_every: int = 0,
    ) -> None: ...
    @property
    def num_constants(self) -> int: ...

class RouteRule:
    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        scoring: str,
        renormalise: bool,
        gate_scale: float = 1.0,
        groups: int = 1,
        used_groups: int = 1,
        group_by_two: bool = False,
    ) -> None: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...

class UseRows:
    def __init__(
        self,
        *,
        raw: NDArray[np.float64],
        now: NDArray[np.float64],
        before: NDArray[np.float64],
        odds: NDArray[np.float64],
        weights: NDArray[np.float64],
        left: float,
        share: float,
    ) -> None: ...
    def mix(
        self, *, habit: NDArray[np.float64], text: _F32, weights: NDArray[np.float64]
    ) -> None: ...
    def token(self, layer: int, chosen: _I32, scores: _F32, keep: bool) -> None: ...
    def weigh(self, layer: int, chosen: _I32, against: _I32, keep: bool) -> None: ...

class PathRows:
    def __init__(
        self,
        *,
        scores: NDArray[np.float64],
        late: NDArray[np.float64],
        paths: _I32,
        version: NDArray[np.uint32],
        penalty: float,
    ) -> None: ...
    def follow(
        self,
        layer: int,
        chosen: _I32,
        odds: NDArray[np.float64],
        now: float,
        stop: int,
        has: NDArray[np.int8],
        level: int,
    ) -> tuple[int, _I32]: ...
    def foresee(self, odds: NDArray[np.float64], now: float) -> None: ...

class RoundedRows:
    def __init__(self, matrix: _F32, bias: _F32) -> None: ...
    def dot(self, x: _F32, out: _F32) -> None: ...

def decay_uses(uses: NDArray[np.float64], chosen: _I32, left: float) -> None: ...
def renew_records(
    records: NDArray[np.float64],
    last: NDArray[np.float64],
    chosen: _I32,
    bits: NDArray[np.int8],
    worth: NDArray[np.float64],
    now: float,
) -> None: ...
def expect_uses(
    scores: NDArray[np.float64], odds: NDArray[np.float64], now: float, round: float
) -> None: ...
def mix_odds(
    habit: NDArray[np.float64], text: _F32, weights: NDArray[np.float64], out: NDArray[np.float64]
) -> None: ...
def likeliest(scores: _F32, has: NDArray[np.int8], wanted: NDArray[np.int8], most: int) -> _I32: ...

class PathTable:
    def __init__(self, *, pairs: _F32, far: _F32 | None, totals: _F32, uses: _F32) -> None: ...
    def count(self, path: _I32) -> None: ...
    def follow(self, layer: int, last: _I32, before: _I32 | None, out: _F32) -> bool: ...

class PrecisionRule:
    t1: float
    t2: float
    def __init__(self, *, level_bits: Sequence[int], low: int, high: int, strict: bool) -> None: ...
    def token(self, gates: _F32, experts: _I32, has: NDArray[np.int8]) -> NDArray[np.int8]: ...
    def ahead(
        self, gates: _F32 | None, experts: _I32, has: NDArray[np.int8], first: int
    ) -> tuple[_I32, NDArray[np.int8], bool]: ...

class Cache:
    def __init__(
        self,
        *,
        file: File | None,
        num_experts: int,
        hidden: int,
        expert_hidden: int,
        rung_widths: Sequence[Sequence[int]],
        ends: Sequence[int],
        offsets: NDArray[np.uint64],
        crcs: NDArray[np.uint32],
        rungs: NDArray[np.uint8],
        layers: Sequence[int],
        max_level: int,
        budget_bytes: int,
        verify: bool,
        num_readers: int,
        policy: str | Priorities,
        scheme: str = "nested",
        most_bytes: int = 0,
        gated: bool = True,
        row_scales: Sequence[int] = [1],
        ranks: Sequence[Sequence[int]] = [[], [], []],
        others: Sequence[File] = [],
        file_of: NDArray[np.uint8] | None = None,
        names: NDArray[np.int32] | None = None,
        device: Device | None = None,
    ) -> None: ...
    @staticmethod
    def on_device(device: Device, host: Cache, budget_bytes: int) -> Cache: ...
    def begin(
        self,
        experts: _I32,
        levels: NDArray[np.int8],
        offsets: _I32,
        num_tokens: int,
        ahead: _I32 | None = None,
        ahead_levels: NDArray[np.int8] | None = None,
    ) -> None: ...
    def ask(
        self,
        layer: int,
        experts: _I32,
        bits: NDArray[np.int8],
        offsets: _I32,
        num_tokens: int,
        ahead: _I32 | None = None,
        ahead_bits: NDArray[np.int8] | None = None,
    ) -> tuple[_I32, NDArray[np.int8]]: ...
    def next(self) -> list[int]: ...
    def count(self, experts: _I32, levels: NDArray[np.int8]) -> None: ...
    def close(self) -> None: ...
    def shrink(self, expert: int, level: int) -> bool: ...
    def keep(self, level: int) -> None: ...
    def set_budget(self, bytes: int) -> None: ...
    def set_policy(self, policy: str | Priorities) -> None: ...
    def check_integrity(self) -> None: ...
    def slot_bytes(self, level: int) -> int: ...
    @property
    def levels(self) -> NDArray[np.int8]: ...
    @property
    def max_level(self) -> int: ...
    @property
    def taken_slots(self) -> int: ...
    def read_rate(self, threads: int) -> float: ...
    def decode(
        self, expert: int, level: int, basis: NDArray[np.int8] | None = None
    ) -> list[_F32]: ...
    @property
    def progress(self) -> tuple[int, float]: ...
    @property
    def uses(self) -> NDArray[np.float64]: ...
    @uses.setter
    def uses(self, uses: NDArray[np.float64]) -> None: ...
    @property
    def content(self) -> _U8: ...
    @property
    def reads(self) -> NDArray[np.uint32]: ...
    @property
    def residency(self) -> NDArray[np.int8]: ...
    @property
    def runs(self) -> NDArray[np.uint32]: ...
    @property
    def lacks(self) -> NDArray[np.uint32]: ...
    @property
    def stats(self) -> dict[str, Any]: ...

def linear(ws: Workspace, x: _F32, matrices: Sequence[Nested], outs: Sequence[_F32]) -> None: ...
def project(ws: Workspace, x: _F32, basis: NDArray[np.int8], out: _F32) -> None: ...
def linear_f32(ws: Workspace, x: _F32, matrix: _F32, out: _F32) -> None: ...
def linear_heads(ws: Workspace, x: _F32, w: Nested, heads: int, out: _F32) -> None: ...
def add_norm(
    ws: Workspace, added: _F32, scale: float, x: _F32, weight: _F32, eps: float, out: _F32
) -> None: ...
def rms_norm(ws: Workspace, x: _F32, weight: _F32, eps: float, out: _F32) -> None: ...
def attention(
    ws: Workspace,
    layer: AttentionLayer,
    q: _F32,
    k: _F32,
    v: _F32,
    pos: int,
    cos: _F32,
    sin: _F32,
    rope: Rope | None,
    kv: KvLayer,
    out: _F32,
) -> None: ...
def attend(
    ws: Workspace,
    layer: AttentionLayer,
    x: _F32,
    qkv: Sequence[Nested],
    o: Nested,
    q: _F32,
    k: _F32,
    v: _F32,
    pos: int,
    cos: _F32,
    sin: _F32,
    rope: Rope | None,
    kv: KvLayer,
    heads: _F32,
    out: _F32,
) -> None: ...
def latent_attention(
    ws: Workspace,
    layer: LatentLayer,
    q: _F32,
    absorbed: _F32,
    keys: _F32,
    pos: int,
    cos: _F32 | None,
    sin: _F32 | None,
    kv: KvLayer,
    out: _F32,
) -> None: ...
def attend_latents(
    ws: Workspace,
    layer: LatentLayer,
    x: _F32,
    projections: tuple[Nested, Nested, Nested | None, Nested, Nested, Nested],
    q_norm: _F32 | None,
    eps: float,
    rows: Sequence[_F32],
    pos: int,
    cos: _F32 | None,
    sin: _F32 | None,
    kv: KvLayer,
    out: _F32,
) -> None: ...
def route(
    ws: Workspace,
    x: _F32,
    router: _F32,
    bias: _F32 | None,
    choice_bias: _F32 | None,
    rule: RouteRule,
    scores: _F32,
    experts: _I32,
    gates: _F32,
) -> None: ...
def choose(
    ws: Workspace,
    bias: _F32 | None,
    choice_bias: _F32 | None,
    rule: RouteRule,
    scores: _F32,
    experts: _I32,
    gates: _F32,
) -> None: ...
def slot_scores(
    ws: Workspace,
    x: _F32,
    weight: _F32,
    gate_weight: _F32,
    bias: _F32,
    experts: _I32,
    gates: _F32,
    scores: _F32,
) -> None: ...
def look_ahead(
    ws: Workspace,
    x: _F32,
    norms: Sequence[_F32],
    routers: Sequence[_F32],
    biases: Sequence[_F32 | None],
    choice_biases: Sequence[_F32 | None],
    eps: float,
    rule: RouteRule,
    normed: _F32,
    scores: _F32,
    experts: _I32,
    gates: _F32,
) -> None: ...
def ffn(
    ws: Workspace,
    x: _F32,
    gate: Nested | None,
    up: Nested,
    down: Nested,
    out: _F32,
    hidden: _F32 | None = None,
    activation: str = "swiglu",
) -> None: ...
def soft_cap(ws: Workspace, cap: float, x: _F32) -> None: ...
def run_experts(
    ws: Workspace,
    x: _F32,
    cache: Cache,
    experts: _I32,
    levels: NDArray[np.int8],
    offsets: _I32,
    tokens: _I32,
    rows: _I32,
    gates: _F32,
    parts: _F32,
    out: _F32,
    activation: str,
    biases: Sequence[_F32 | None] | None,
    basis: NDArray[np.int8] | None,
    projected: _F32 | None,
    beside: tuple[Nested | None, Nested, Nested] | None = None,
    beside_out: _F32 | None = None,
) -> None: ...
def run_chosen(
    ws: Workspace,
    x: _F32,
    cache: Cache,
    layer: int,
    chosen: _I32,
    gates: _F32,
    levels: NDArray[np.int8],
    parts: _F32,
    out: _F32,
    activation: str,
    biases: Sequence[_F32 | None] | None,
    basis: NDArray[np.int8] | None,
    beside: tuple[Nested | None, Nested, Nested] | None = None,
    beside_out: _F32 | None = None,
) -> None: ...
def expect_experts(
    ws: Workspace, cache: Cache, first: int, experts: _I32, beside: int = 0
) -> None: ...
def expert_ffn(
    ws: Workspace,
    x: _F32,
    cache: Cache,
    experts: _I32,
    levels: NDArray[np.int8],
    offsets: _I32,
    tokens: _I32,
    group: Sequence[int],
    parts: _F32,
    hidden: _F32 | None = None,
    activation: str = "swiglu",
    biases: Sequence[_F32 | None] | None = None,
    basis: NDArray[np.int8] | None = None,
    projected: _F32 | None = None,
) -> None: ...
def add_bias(ws: Workspace, bias: _F32, out: _F32) -> None: ...
def multiply(ws: Workspace, factors: _F32, out: _F32) -> None: ...
def combine(ws: Workspace, parts: _F32, rows: _I32, gates: _F32, out: _F32) -> None: ...
def add_rows(
    ws: Workspace,
    x: _F32,
    scale: float,
    gate_weight: _F32 | None,
    gate_input: _F32 | None,
    out: _F32,
) -> None: ...
def short_conv(
    ws: Workspace,
    x: _F32,
    weight: _F32,
    bias: _F32 | None,
    before: _F32 | None,
    tail: _F32,
    silu: bool,
    out: _F32,
) -> None: ...
def delta_rule(
    ws: Workspace,
    qkv: _F32,
    decay: _F32,
    beta: _F32,
    rate: _F32,
    bias: _F32,
    key_heads: int,
    bounded: bool,
    before: _F32 | None,
    state: _F32,
    out: _F32,
) -> None: ...
def mamba2(
    ws: Workspace,
    xbc: _F32,
    step: _F32,
    decay: _F32,
    rate: _F32,
    step_bias: _F32,
    skip: _F32,
    groups: int,
    before: _F32 | None,
    state: _F32,
    out: _F32,
) -> None: ...
def gated_norm(
    ws: Workspace, x: _F32, gate: _F32, weight: _F32, eps: float, groups: int, kind: str
) -> None: ...
def gate_attention(ws: Workspace, x: _F32, gate: _F32, kind: str) -> None: ...

# A device's memory, and what it computes there.

def probe_device(path: str) -> dict[str, Any]: ...

class Device:
    def __init__(self, path: str, ordinal: int, budget_bytes: int) -> None: ...
    def measure(self, bytes: int) -> tuple[float, float]: ...
    def use_mailbox(self, yes: bool) -> None: ...
    def limit(self, budget_bytes: int) -> None: ...
    @staticmethod
    def taken(bytes: int) -> int: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def stats(self) -> dict[str, int]: ...
    @property
    def is_lost(self) -> bool: ...

class DeviceStream:
    def __init__(self, device: Device, window: int) -> None: ...
    @staticmethod
    def bytes(window: int) -> int: ...
    def measure(self) -> float: ...
    @property
    def bytes_in(self) -> int: ...

class DeviceArray:
    def __init__(self, device: Device, shape: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> DeviceArray: ...
    def item(self, index: int) -> DeviceArray: ...
    def upload(self, array: _F32) -> None: ...
    def numpy(self) -> _F32: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

class DeviceMatrix:
    def __init__(self, device: Device, matrix: Nested) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def bytes(self) -> int: ...

class DeviceTable:
    def __init__(self, device: Device, cache: Cache) -> None: ...
    @staticmethod
    def bytes(num_experts: int) -> int: ...
    def fill(self, cache: Cache, layer: int, levels: NDArray[np.int8]) -> None: ...

class DeviceKvLayer:
    def __init__(
        self,
        *,
        device: Device,
        key_type: str,
        value_type: str,
        num_heads: int,
        capacity: int,
        head_dim: int,
    ) -> None: ...
    @staticmethod
    def latents(
        *, device: Device, type: str, capacity: int, head_dim: int, value_dim: int
    ) -> DeviceKvLayer: ...
    def take(self, source: DeviceKvLayer, begin: int, end: int) -> None: ...
    @property
    def content(self) -> _U8: ...

class DeviceAttention:
    def __init__(
        self,
        *,
        index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        scale: float,
        q_bias: DeviceArray | None,
        k_bias: DeviceArray | None,
        v_bias: DeviceArray | None,
        q_norm: DeviceArray | None,
        k_norm: DeviceArray | None,
        v_norm: DeviceArray | None = None,
        sinks: DeviceArray | None = None,
        norm_per_head: bool,
        norm_eps: float,
        clip: float,
        rope_dim: int,
        norm_after_rope: bool,
        chunk: int = 0,
        growth: float = 0,
        grow_every: int = 0,
    ) -> None: ...
    @property
    def num_constants(self) -> int: ...

class DeviceLatents:
    def __init__(
        self,
        *,
        index: int,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        scale: float,
        rotates: bool,
        grow_every: int,
        growth: float,
        norm: DeviceArray,
        norm_eps: float,
    ) -> None: ...

class DeviceWorkspace:
    def __init__(
        self,
        device: Device,
        max_rows: int,
        max_cols: int,
        max_hidden: int,
        max_context: int,
        head_dim: int,
        num_heads: int,
        max_routed: int,
        corrected: bool = False,
    ) -> None: ...
    @staticmethod
    def bytes(
        max_rows: int,
        max_cols: int,
        max_hidden: int,
        max_context: int,
        head_dim: int,
        num_heads: int,
        max_routed: int,
        corrected: bool = False,
    ) -> int: ...
    def place(self, pos: int) -> None: ...
    def begin_noting(self) -> None: ...
    def end_noting(self) -> int: ...
    def repeat(self, noted: int) -> bool: ...
    def forget(self, noted: int) -> None: ...

def device_attention(
    ws: DeviceWorkspace,
    layer: DeviceAttention,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    pos: int,
    cos: DeviceArray,
    sin: DeviceArray,
    kv: DeviceKvLayer,
    out: DeviceArray,
) -> None: ...
def device_linear(
    ws: DeviceWorkspace,
    x: DeviceArray,
    matrices: Sequence[DeviceMatrix],
    outs: Sequence[DeviceArray],
) -> None: ...
def device_linear_heads(
    ws: DeviceWorkspace, x: DeviceArray, weight: DeviceMatrix, heads: int, out: DeviceArray
) -> None: ...
def device_ffn(
    ws: DeviceWorkspace,
    x: DeviceArray,
    gate: DeviceMatrix | None,
    up: DeviceMatrix,
    down: DeviceMatrix,
    out: DeviceArray,
    activation: str = "swiglu",
) -> None: ...
def device_add_norm(
    ws: DeviceWorkspace,
    added: DeviceArray | None,
    scale: float,
    x: DeviceArray,
    weight: DeviceArray,
    eps: float,
    out: DeviceArray,
) -> None: ...
def device_add_rows(
    ws: DeviceWorkspace,
    x: DeviceArray,
    scale: float,
    gate_weight: DeviceArray | None,
    gate_input: DeviceArray | None,
    out: DeviceArray,
) -> None: ...
def device_can_choose(rule: RouteRule) -> bool: ...
def device_choose(
    ws: DeviceWorkspace,
    rule: RouteRule,
    logits: DeviceArray,
    bias: DeviceArray | None,
    choice_bias: DeviceArray | None,
    experts: DeviceArray,
    gates: DeviceArray,
) -> None: ...
def device_chosen_ffn(
    ws: DeviceWorkspace,
    x: DeviceArray,
    table: DeviceTable,
    experts: DeviceArray,
    gates: DeviceArray,
    parts: DeviceArray,
    out: DeviceArray,
    activation: str = "swiglu",
    biases: Sequence[DeviceArray] = [],
) -> None: ...
def device_collect(ws: DeviceWorkspace, outs: Sequence[_F32]) -> None: ...
def device_post(ws: DeviceWorkspace, arrays: Sequence[DeviceArray]) -> bool: ...
def device_add_bias(ws: DeviceWorkspace, bias: DeviceArray, out: DeviceArray) -> None: ...
def device_scale(ws: DeviceWorkspace, factor: float, out: DeviceArray) -> None: ...
def device_matmul(ws: DeviceWorkspace, x: DeviceArray, w: DeviceArray, y: DeviceArray) -> None: ...
def device_expert_ffn(
    ws: DeviceWorkspace,
    x: DeviceArray,
    cache: Cache,
    experts: _I32,
    levels: NDArray[np.int8],
    offsets: _I32,
    tokens: _I32,
    group: Sequence[int],
    parts: DeviceArray,
    activation: str = "swiglu",
    biases: Sequence[DeviceArray] = [],
    basis: DeviceArray | None = None,
    stream: DeviceStream | None = None,
) -> None: ...
def device_run_hits(
    ws: DeviceWorkspace,
    x: DeviceArray,
    cache: Cache,
    first: int,
    chosen: _I32,
    gates: _F32,
    levels: NDArray[np.int8],
    counts: NDArray[np.float64],
    weight: float,
    parts: DeviceArray,
    out: DeviceArray,
    activation: str,
    biases: Sequence[DeviceArray],
    basis: DeviceArray | None,
) -> bool: ...
def device_combine(
    ws: DeviceWorkspace, parts: DeviceArray, rows: _I32, gates: _F32, out: DeviceArray
) -> None: ...
def device_multiply(ws: DeviceWorkspace, factors: DeviceArray, out: DeviceArray) -> None: ...
def device_weigh(ws: DeviceWorkspace, x: DeviceArray, gates: _F32, out: DeviceArray) -> None: ...
def device_latent_attention(
    ws: DeviceWorkspace,
    layer: DeviceLatents,
    q: DeviceArray,
    absorbed: DeviceArray,
    keys: DeviceArray,
    pos: int,
    cos: DeviceArray | None,
    sin: DeviceArray | None,
    kv: DeviceKvLayer,
    out: DeviceArray,
) -> None: ...
def device_short_conv(
    ws: DeviceWorkspace,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    before: DeviceArray | None,
    tail: DeviceArray,
    silu: bool,
    out: DeviceArray,
) -> None: ...
def device_delta_rule(
    ws: DeviceWorkspace,
    qkv: DeviceArray,
    decay: DeviceArray,
    beta: DeviceArray,
    rate: DeviceArray,
    bias: DeviceArray,
    key_heads: int,
    bounded: bool,
    before: DeviceArray | None,
    state: DeviceArray,
    out: DeviceArray,
) -> None: ...
def device_mamba2(
    ws: DeviceWorkspace,
    xbc: DeviceArray,
    step: DeviceArray,
    decay: DeviceArray,
    rate: DeviceArray,
    step_bias: DeviceArray,
    skip: DeviceArray,
    groups: int,
    before: DeviceArray | None,
    state: DeviceArray,
    out: DeviceArray,
) -> None: ...
def device_gated_norm(
    ws: DeviceWorkspace,
    x: DeviceArray,
    gate: DeviceArray,
    weight: DeviceArray,
    eps: float,
    groups: int,
    kind: str,
) -> None: ...
def device_gate_attention(
    ws: DeviceWorkspace, x: DeviceArray, gate: DeviceArray, kind: str
) -> None: ...
def device_download(
    ws: DeviceWorkspace, arrays: Sequence[DeviceArray], outs: Sequence[_F32]
) -> None: ...
