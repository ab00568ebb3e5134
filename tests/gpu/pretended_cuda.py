"""A CUDA device that is not there: the engine's GPU path runs on a CPU, and what CUDA would refuse is refused.

    with PretendedCuda() as device:  # with TRITON_INTERPRET=1 from the start of the process
        engine = Engine.from_pretrained(directory, device="cuda")

A tensor on it says that it is on cuda:0, and holds a CPU tensor that computes for it; kernels run in Triton's
interpreter. C++ sees a wrapper on the meta device (a CUDA device would make autograd look for a driver), so the word
"cuda" becomes "meta" in calls of torch (`_FunctionMode`), and operations that create meta tensors create these
(`_DispatchMode`). Refused as CUDA refuses it: tensors of two devices in one operation, CPU tensors in kernels, numpy
of a GPU tensor, grids that are too large, more memory than there is; while a graph is captured, also syncs and copies
from the host.

A capture computes nothing: the operations are recorded, and what they allocate holds NaN until the first replay and
again after a replay of another graph in the same memory pool. Memory from torch.empty holds NaN, too, and memory that
was freed, which kernels may still read where a table holds its address.

The device counts launches, kernels, syncs by source line, compiled variants of kernels, and bytes in use and at most.
It does not see asynchrony, several streams, alignment beyond what kernels specialise on, workspaces of libraries, or
what an allocator loses by rounding and fragmentation.
"""

import contextlib
import ctypes
import inspect
import itertools
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

CUDA, META = torch.device("cuda:0"), torch.device("meta")
ROOT = Path(__file__).parents[2]
SOURCES = tuple(str(ROOT / folder) for folder in ("seal_engine", "kernels/seal_kernels"))
MAX_GRID = (2**31 - 1, 65535, 65535)

# Operations of torch that launch nothing: they make views or memory.
NO_LAUNCH = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty",
    "empty_like", "empty_strided", "expand", "lift", "lift_fresh", "new_empty", "new_empty_strided", "permute",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze",
    "view",
}  # fmt: skip
UNINITIALIZED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operations that may mix devices: copies, and indexing, whose indices are copied to the device.
MIXED_DEVICES = {"_index_put_impl_", "_to_copy", "copy_", "index", "index_put", "index_put_"}
# Operations that take a CPU tensor of no dimensions as a number, as pointwise ones do.
TAKE_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "where"}
# Operations whose result's size depends on values: the host waits for them.
DATA_DEPENDENT = {"_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "unique_dim"}


class CudaTensor(Tensor):
    """A tensor that says that it is on cuda:0. `data_on_cpu` holds its numbers, `allocation` counts its memory."""

    data_on_cpu: Tensor
    allocation: "_Allocation"

    @staticmethod
    def __new__(cls, data: Tensor, allocation: "_Allocation"):
        tensor = Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            layout=data.layout, device=META, requires_grad=False,
        )  # fmt: skip
        tensor.data_on_cpu, tensor.allocation = data, allocation
        return tensor

    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda, is_cpu, is_meta = True, False, False

    def __repr__(self, **options):
        return f"cuda({self.data_on_cpu!r})"

    def __format__(self, format_spec):
        return format(self.item(), format_spec) if self.dim() == 0 else repr(self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _running().call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _running().dispatch(func, args, kwargs or {})


class _Allocation:
    """The memory of one storage on the device: in use until the last tensor of it is gone. Then it holds NaN."""

    def __init__(self, device: "PretendedCuda", storage: torch.UntypedStorage, pool: "_Pool | None"):
        size = storage.nbytes()
        self.storage, self.size, self.owner = storage, size, pool or device
        if pool is None and device.bytes_in_use + size > device.total_bytes:
            self.size = 0
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes on the pretended device")
        self.owner.add_bytes(size)

    def __del__(self):
        self.owner.add_bytes(-self.size)
        ctypes.memset(self.storage.data_ptr(), 0xFF, self.size)  # in floats of any size NaN, in integers -1


class _Pool:
    """The memory of captured graphs: as much as it ever held, for as long as one of its graphs is there."""

    def __init__(self, device: "PretendedCuda"):
        self.device = device
        self.bytes_in_use = self.reserved = 0
        self.graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()

    def add_bytes(self, size: int) -> None:
        self.bytes_in_use += size
        if self.bytes_in_use > self.reserved:
            self.device.add_bytes(self.bytes_in_use - self.reserved)
            self.reserved = self.bytes_in_use

    def __del__(self):
        self.device.add_bytes(-self.reserved)


class _Graph:
    """Stands in for torch.cuda.CUDAGraph: operations in the order of their capture, replayed into the same memory."""

    def __init__(self):
        self.steps: list[Callable[[], None]] = []
        self.allocated: list[Tensor] = []  # CPU tensors that the capture made
        self.num_launches = 0
        self.pool: _Pool | None = None

    def capture_begin(self, pool: _Pool | None = None) -> None:
        device = _running()
        device.num_captures += 1
        self.pool = pool or _Pool(device)
        self.pool.graphs.add(self)
        device.captured = self

    def capture_end(self) -> None:
        _running().captured = None
        self.poison()

    def record(self, func: Any, run: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operation that allocated some of its outputs, or wrote into its arguments; run is what does it."""
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [i for i, t in enumerate(outs) if t.untyped_storage().data_ptr() not in inputs]
        if not new and not func._schema.is_mutable:
            return  # a view
        self.allocated += [outs[i] for i in new]
        if func._schema.name.split("::")[1] in UNINITIALIZED:
            return

        def step() -> None:
            results = [t for t in tree_leaves(run(*args, **kwargs)) if isinstance(t, Tensor)]
            for i in new:
                outs[i].copy_(results[i])

        self.steps.append(step)

    def poison(self) -> None:
        """Fill what the capture allocated with NaN: it is not the graph's before its replay."""
        for tensor in self.allocated:
            if tensor.is_floating_point() and _running().computes:
                tensor.fill_(float("nan"))

    def replay(self) -> None:
        device = _running()
        device.refuse_in_capture("replay of a graph")
        device.num_replays += 1
        for graph in self.pool.graphs if self.pool else ():
            if graph is not self:
                graph.poison()
        with torch._C._DisableTorchDispatch():
            for step in self.steps:
                step()

    def reset(self) -> None:
        self.__init__()


def _product_of_dtype(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


class PretendedCuda:
    """The device and its counts. As a context manager, it is the CUDA device of this process while it lasts."""

    def __init__(self, total_bytes: int = 1 << 30):
        self.total_bytes = total_bytes
        self.bytes_in_use = self.peak_bytes = 0
        self.captured: _Graph | None = None  # the graph that is being captured
        self.computes = True  # whether Triton's kernels run
        self.inside = 0  # > 0 while torch runs an operation of this device: then "meta" means the device
        self.variants: dict[str, set] = {}  # a kernel's name -> what it would be compiled for
        self.allocations: weakref.WeakValueDictionary[int, _Allocation] = weakref.WeakValueDictionary()
        self.pinned: dict[int, torch.UntypedStorage] = {}  # host memory that the device copies from by itself
        self.arriving: list[Callable[[], Any]] = []  # copies to pinned memory that the host has not waited for
        self._exit = contextlib.ExitStack()
        self.reset_counts()

    def reset_counts(self) -> None:
        """Start all counts and the peak anew; variants stay, because a kernel is compiled once."""
        self.launches: Counter[str] = Counter()  # of torch's kernels, by operation and line
        self.kernels: Counter[str] = Counter()  # launches of Triton's kernels, by name
        self.syncs: Counter[str] = Counter()  # what makes the host wait for the device, by kind and line
        self.num_captures = self.num_replays = 0
        self.peak_bytes = self.bytes_in_use

    @contextlib.contextmanager
    def counting_only(self) -> Iterator[None]:
        """Triton's kernels are counted and not run, and new memory holds zeros: the same counts, ten times as fast."""
        self.computes = False
        try:
            yield
        finally:
            self.computes = True

    @property
    def num_launches(self) -> int:
        """Launches of torch's and of Triton's kernels, those of replayed graphs not among them."""
        return self.launches.total() + self.kernels.total()

    @property
    def num_variants(self) -> int:
        """Compilations of Triton's kernels."""
        return sum(map(len, self.variants.values()))

    def varying_arguments(self) -> str:
        """For each kernel, its number of variants and the arguments in which these differ: a line per kernel."""
        lines = []
        for name, variants in sorted(self.variants.items(), key=lambda item: -len(item[1])):
            values: dict[str, set] = {}
            for argument, value in itertools.chain.from_iterable(variants):
                values.setdefault(argument, set()).add(str(value))
            differing = "; ".join(f"{k}: {' | '.join(sorted(v))}" for k, v in values.items() if len(v) > 1)
            lines.append(f"{len(variants)} variants of {name}: {differing}")
        return "\n".join(lines)

    def report(self) -> str:
        """All counts, as a text."""
        lines = [
            f"{self.num_launches} launches, {self.kernels.total()} of them Triton's; {self.syncs.total()} syncs; "
            f"{self.num_captures} graphs captured, {self.num_replays} replays; {self.num_variants} compiled variants; "
            f"{self.bytes_in_use} bytes in use, {self.peak_bytes} at most",
            *(f"  {n} syncs: {line}" for line, n in self.syncs.most_common()),
        ]
        return "\n".join(lines)

    def add_bytes(self, size: int) -> None:
        """Count memory that was taken or, below 0, given back."""
        self.bytes_in_use += size
        self.peak_bytes = max(self.peak_bytes, self.bytes_in_use)

    def tensor(self, data: Tensor) -> CudaTensor:
        """A tensor of the device over a CPU tensor, which shares its memory count with tensors of the same storage."""
        storage = data.untyped_storage()
        allocation = self.allocations.get(storage._cdata)
        if allocation is None:
            allocation = _Allocation(self, storage, self.captured.pool if self.captured else None)
            self.allocations[storage._cdata] = allocation
        return CudaTensor(data, allocation)

    def refuse_in_capture(self, kind: str) -> None:
        if self.captured is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")

    def sync(self, kind: str) -> None:
        """The host waits for the device: what was to be copied to pinned memory has arrived."""
        self.refuse_in_capture(kind)
        self.syncs[f"{kind}, {_source_line()}"] += 1
        while self.arriving:
            self.arriving.pop()()

    def copy_from_host(self, source: Tensor | None = None, non_blocking: bool = False) -> None:
        """A copy from the host, which waits for it, and so for all before it, unless it is from pinned memory."""
        self.refuse_in_capture("copy from the host")
        if source is None or not non_blocking or not self._is_pinned(source):
            self.sync("copy from the host")

    def copy_to_host(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """A copy to the host. If it need not wait, pinned memory holds NaN until the host waits for something."""
        if not non_blocking or not self._is_pinned(target):
            self.sync("copy to the host")
            target.copy_(source)
            return
        self.refuse_in_capture("copy to the host")
        ctypes.memset(target.data_ptr(), 0xFF, target.nbytes)
        source = source.clone()
        self.arriving.append(lambda: target.copy_(source))

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned

    def _pin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return x

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A function of torch with a tensor of the device among its arguments."""
        if func is Tensor.tolist:
            self.sync("tolist")
            return args[0].data_on_cpu.tolist()
        if func is Tensor.data_ptr:
            return args[0].data_on_cpu.data_ptr()
        if func is Tensor.get_device:
            return 0
        if func is Tensor.numpy or func is Tensor.__array__:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.cuda:
            return args[0]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._index(args[1]), *args[2:])
        self.inside += 1
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finally:
            self.inside -= 1

    def _index(self, index: Any) -> Any:
        """An index with lists made tensors of the device, as torch does, which copies them from the host."""
        if isinstance(index, list):
            self.copy_from_host()
            return self.tensor(torch.tensor(index))
        return tuple(map(self._index, index)) if isinstance(index, tuple) else index

    def dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation of torch: refuse what CUDA refuses, count, and compute on the CPU or record."""
        flat, spec = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, CudaTensor)]
        name, wanted = func._schema.name.split("::")[1], kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        here = bool(ours) or self.inside > 0
        if not ours and not (wanted is not None and (wanted.type == "cuda" or (wanted.type == "meta" and here))):
            pin_memory = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            return self._pin(out) if pin_memory else out
        on_host = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
        self._check_devices(func, name, ours, on_host)
        if name == "_to_copy" and ours and wanted is not None and wanted.type == "cpu":
            self.sync("copy to the host")
            return func(ours[0].data_on_cpu, **{**kwargs, "non_blocking": False})
        if name == "_to_copy" and not ours:
            self.copy_from_host(args[0], kwargs.get("non_blocking", False))
        elif name == "copy_" and ours and on_host:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if not isinstance(args[0], CudaTensor):
                self.copy_to_host(args[0], args[1].data_on_cpu, non_blocking)
                return args[0]
            if on_host[0].dim() > 0:
                self.copy_from_host(on_host[0], non_blocking)
        elif name == "_local_scalar_dense":
            self.sync("item")
        elif name in DATA_DEPENDENT:
            self.sync(name)
        elif name.lstrip("_").startswith("index") and name in MIXED_DEVICES:
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.sync("index by booleans")
            for _ in filter(lambda x: not isinstance(x, CudaTensor) and x.dim() > 0, indices):
                self.copy_from_host()
        if name not in NO_LAUNCH:
            self.launches[f"{name}, {_source_line()}"] += 1
            if self.captured is not None:
                self.captured.num_launches += 1
        cpu_args, cpu_kwargs = tree_unflatten([_on_cpu(x) for x in flat], spec)
        out = self._compute(func, cpu_args, cpu_kwargs)
        wrappers = {id(x.data_on_cpu): x for x in ours}

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return wrappers[id(x)] if id(x) in wrappers else self.tensor(x)

        wrapped = tree_map(wrap, out)
        if name in UNINITIALIZED:
            if not self.computes:
                out.zero_()
            elif out.is_floating_point():
                out.fill_(float("nan"))
        return wrapped

    def _check_devices(self, func: Any, name: str, ours: list, on_host: list) -> None:
        if not ours or not on_host or name in MIXED_DEVICES:
            return
        takes_numbers = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS
        if not takes_numbers or any(x.dim() > 0 for x in on_host):
            devices = "found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"Expected all tensors to be on the same device, but {devices} ({name})")

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on CPU tensors. In a capture, what would write into its arguments is only recorded."""
        run = _product_of_dtype if func is torch.ops.aten.mm.dtype_out else func  # a CPU lacks it
        if self.captured is None:
            return run(*args, **kwargs)
        if func._schema.is_mutable:
            out = kwargs["out"] if "out" in kwargs else args[0]
        else:
            out = run(*args, **kwargs)
        self.captured.record(func, run, args, kwargs, out)
        return out

    def launch(self, executor: Any, run: Callable, args: tuple, kwargs: dict) -> None:
        """Launch a kernel of Triton: count it, check its arguments, run it in the interpreter or record it."""
        name = executor.fn.__name__
        for i, x in enumerate((*args, *kwargs.values())):
            if isinstance(x, Tensor) and not isinstance(x, CudaTensor):
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?): {name}")
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        constants = {*executor.constexprs, *(key for key in kwargs if key not in executor.arg_names)}
        variant = tuple(sorted((k, v if k in constants else _specialisation(v)) for k, v in named.items()))
        self.variants.setdefault(name, set()).add(variant)
        if not callable(executor.grid):
            for size, limit in zip(executor.grid, MAX_GRID, strict=False):
                if size > limit:
                    raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {executor.grid}: {name}")
        self.kernels[name] += 1
        args, kwargs = tree_map(_on_cpu, (args, kwargs))

        def step() -> None:
            if self.computes:
                with torch._C._DisableTorchDispatch():
                    run(executor, *args, **kwargs)

        if self.captured is None:
            step()
        else:
            self.captured.num_launches += 1
            self.captured.steps.append(step)

    def __enter__(self) -> "PretendedCuda":
        import triton.runtime.interpreter

        import seal_engine.model.graphs
        import seal_kernels.dispatch

        global _device
        assert _device is None, "there is one pretended device at a time"
        patch = self._exit.enter_context(pytest.MonkeyPatch.context())
        _hasten_interpreter(patch, self._exit)
        run, device = triton.runtime.interpreter.GridExecutor.__call__, self
        patch.setattr(
            triton.runtime.interpreter.GridExecutor, "__call__",
            lambda executor, *args, **kwargs: device.launch(executor, run, args, kwargs),
        )  # fmt: skip
        for module in (seal_kernels.dispatch, seal_engine.model.graphs):
            patch.setattr(module, "INTERPRET", False)  # CPU tensors run on torch, tensors of this device in Triton
        for name, value in self._torch_cuda().items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        multithreading = torch.autograd.is_multithreading_enabled()
        torch.autograd.set_multithreading_enabled(False)  # modes hold in one thread
        self._exit.callback(torch.autograd.set_multithreading_enabled, multithreading)
        _device = self
        self._exit.enter_context(_DispatchMode())
        self._exit.enter_context(_FunctionMode())
        return self

    def __exit__(self, *error: Any) -> None:
        global _device
        self._exit.close()
        _device = None

    def _torch_cuda(self) -> dict[str, Any]:
        """What stands in for the names of torch.cuda."""

        class Stream:
            cuda_stream = 0

            def __init__(self, *args: Any, **options: Any):
                pass

            def wait_stream(self, other: Any) -> None:
                pass

            def synchronize(self) -> None:
                _running().sync("synchronize")

        class Event:
            def record(self) -> None:
                pass

            def synchronize(self) -> None:
                _running().sync("wait for an event")

        class Properties:
            name, major, minor, multi_processor_count = "pretended", 9, 0, 132
            total_memory = self.total_bytes

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *args: "pretended",
            "get_device_capability": lambda *args: (9, 0),
            "get_device_properties": lambda *args: Properties,
            "mem_get_info": lambda *args: (self.total_bytes - self.bytes_in_use, self.total_bytes),
            "memory_allocated": lambda *args: self.bytes_in_use,
            "memory_reserved": lambda *args: self.bytes_in_use,
            "max_memory_allocated": lambda *args: self.peak_bytes,
            "empty_cache": lambda: None,
            "synchronize": lambda *args: self.sync("synchronize"),
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda *args: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda *args: contextlib.nullcontext(),
            "CUDAGraph": _Graph,
            "graph_pool_handle": lambda: _Pool(self),
            "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *args, **options: None,
        }


_device: PretendedCuda | None = None  # the device of this process


def _running() -> PretendedCuda:
    assert _device is not None, "a tensor of the pretended device has outlived it"
    return _device


def _source_line() -> str:
    """The innermost line of the engine or of its kernels that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCES):
            file = Path(frame.f_code.co_filename).relative_to(ROOT)
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the engine"


def _on_cpu(x: Any) -> Any:
    """What an argument is for a CPU: the data of a tensor of the device, the CPU for the device."""
    if isinstance(x, CudaTensor):
        return x.data_on_cpu
    return torch.device("cpu") if isinstance(x, torch.device) and x.type in ("cuda", "meta") else x


def _specialisation(x: Any) -> str:
    """What of an argument's value or type Triton compiles a kernel for."""
    if isinstance(x, Tensor):
        return f"*{x.dtype}, aligned {x.data_ptr() % 16 == 0}"
    if x is None or x is True or x is False or isinstance(x, float):
        return type(x).__name__
    if isinstance(x, int):
        return "1" if x == 1 else f"int{32 if -(2**31) <= x < 2**31 else 64}, multiple of 16: {x % 16 == 0}"
    return repr(x)


def _is_cuda(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.split(":")[0] == "cuda")


class _DispatchMode(TorchDispatchMode):
    """Operations that make tensors of the device out of none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _running().dispatch(func, args, kwargs or {})


class _FunctionMode(TorchFunctionMode):
    """Where Python asks for cuda, C++ is told meta, and the dispatch makes that the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, _running()
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device")):
            data = args[0] if args else kwargs.pop("data")
            if isinstance(data, CudaTensor):
                return data.to(kwargs.get("dtype") or data.dtype)
            device.copy_from_host()
            return device.tensor(torch.tensor(data, **{**kwargs, "device": "cpu"}))
        if func is Tensor.cuda and not isinstance(args[0], CudaTensor):
            func, args, kwargs = Tensor.to, (args[0], CUDA), {}
        if func is Tensor.cpu and isinstance(args[0], CudaTensor):
            func, args = Tensor.to, (args[0], torch.device("cpu"))
        by_name = _is_cuda(kwargs.get("device"))
        if not by_name and not (func is Tensor.to and any(map(_is_cuda, args[1:]))):
            return func(*args, **kwargs)
        if func is Tensor.to and isinstance(args[0], CudaTensor):  # it is there already
            args = tuple(x for x in args if not _is_cuda(x))
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            if len(args) == 1 and "dtype" not in kwargs:
                return args[0].clone() if kwargs.get("copy") else args[0]
            return func(*args, **kwargs)
        args = tuple(META if _is_cuda(x) else x for x in args)
        if by_name:
            kwargs = {**kwargs, "device": META}
        device.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            device.inside -= 1


class _Generator:
    """Stands in for torch.Generator, on the device, too: there it draws what the CPU draws."""

    _on_cpu = torch.Generator

    def __new__(cls, device: Any = "cpu"):
        return cls._on_cpu("cpu" if _is_cuda(device) else device)


def _hasten_interpreter(patch: pytest.MonkeyPatch, cleanup: contextlib.ExitStack) -> None:
    """Half of the interpreter's time: it patches the language at every call, and asserts that no integer overflows."""
    from triton.runtime import interpreter

    patch_language, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = patch_language(function)
            cleanup.callback(scopes[module].restore)
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", patch_once)
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[_Graph]:
    """A list to which the graphs are added that are captured from now on."""
    graphs: list[_Graph] = []

    class Recorded(_Graph):
        def capture_begin(self, pool: _Pool | None = None) -> None:
            graphs.append(self)
            super().capture_begin(pool)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    return graphs


def plant(patch: pytest.MonkeyPatch, owner: Any, name: str, line: str, fault: str, **names: Any) -> None:
    """Replace `line` in the source of a function or method, owner.name, by `fault`, which may use `names`.

    A test of a test: with the fault in place, it must fail.
    """
    function = inspect.getattr_static(owner, name)
    static = isinstance(function, staticmethod)
    function = function.__func__ if static else function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{line!r} stands {source.count(line)} times in {name}"
    namespace = dict(function.__globals__) | names
    exec(f"from __future__ import annotations\n{source.replace(line, fault)}", namespace)
    planted = namespace[name]
    patch.setattr(owner, name, staticmethod(planted) if static else planted)
