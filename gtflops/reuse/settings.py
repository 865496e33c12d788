"""What modules compute with besides their tensors: attributes, hooks and code, written down the same in every run."""

import copyreg
import dis
import enum
import functools
import hashlib
import sys
import types
import uuid
import warnings
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from gtflops.reuse.digests import header_of

#: Items of configurations that differ between runs and do not enter what a block computes; their private ones are not
#: looked at besides.
_OF_NO_EFFECT_IN_CONFIGURATIONS = frozenset(
    {
        "architectures",
        "gradient_checkpointing",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "use_cache",
        "name_or_path",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torch_dtype",
        "dtype",
        "transformers_version",
    }
)
#: What any module has: its tensors and submodules, which are looked at apart, hooks, and methods that compute nothing;
#: and what differs between runs, or changes in a forward pass, and does not enter what a block computes.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {
    "_compiled_call_impl",
    "train",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_is_hf_initialized",
}
#: The same of transformers' models.
_OF_EVERY_MODEL = _OF_EVERY_MODULE | {
    "problem_type",
    "num_labels",
    "name_or_path",
    "generation_config",
    "warnings_issued",
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: Methods that are called without being named.
_CALLED = frozenset({"forward", "setup_context", "__call__", "__getattr__", "__torch_function__"})
#: With one of these, code reaches what it does not name.
_REACHES_ALL = frozenset({"getattr", "vars", "attrgetter", "methodcaller", "__dict__", "__getattribute__"})
#: Packages of whose functions and classes the name is enough, beside the version.
_KNOWN = sys.stdlib_module_names | {"builtins", "torch", "gtflops"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range)
_BY_REPR = (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype)
_BY_NAME = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)
_WRAPPERS = (staticmethod, classmethod, functools._lru_cache_wrapper)
_CONTAINERS = (dict, list, tuple, set, frozenset, int, float, str, bytes)
_OF_C = (types.BuiltinFunctionType, types.MethodType)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, *_WRAPPERS)
#: Objects in objects, from which on they are not looked into.
_DEEPEST = 50
_HEAP_TYPE = 1 << 9


class Settings(NamedTuple):
    """``digest`` is of everything but the contents of ``tensors``, which are no parameters or buffers of the model."""

    digest: str
    tensors: list[torch.Tensor]


class SettingsReader:
    """Reads the settings of a model's modules.

    They are the attributes of the modules, through containers and objects of any class; their hooks; the code of the
    functions and methods that a forward pass may reach, with defaults, what they close over, and the global names they
    use; and the versions of the packages that these are from. Reached is what reached code names, from ``forward`` on,
    and where code of the user's looks names up at run time, all of the user's classes. Of modules around the blocks,
    attributes are read that reached code names.

    Of what is in an installed package, the values of global names are not looked at, only which functions they are; of
    torch's, the standard library's and gtflops' own functions, the name alone. What cannot be read at all, such as an
    object of a C extension, is a warning, and makes the digest one of this reader's and of no other.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self._modules = list(model.modules())  # whose ids are not another's then
        self._token = uuid.uuid4().hex
        self._unreadable: list[Any] = []

    def read(self, modules: Mapping[str, torch.nn.Module], whole: Container[str]) -> Settings:
        """Of modules by name; of those in ``whole``, also of submodules that the model has got since."""
        return _Reading(self).read(modules, whole)

    def number_of(self, value: Any, owner: str) -> str:
        """Of an object that cannot be read: it is another for each, and for each reader."""
        for number, known in enumerate(self._unreadable):
            if known is value:
                return f"{self._token} {number}"
        self._unreadable.append(value)
        warnings.warn(
            f"{owner} has a {type(value).__module__}.{type(value).__qualname__}, which cannot be compared with that of "
            "another run: the activations that are stored serve this run alone; expected numbers, texts, tensors, "
            "functions, containers and objects of Python of these in what is in front of the boundary",
            stacklevel=3,
        )
        return f"{self._token} {len(self._unreadable) - 1}"


class _Reading:
    """One reading: what was read stays as it was read, and alive, so that an id is not another object's."""

    def __init__(self, reader: SettingsReader) -> None:
        self._reader = reader
        self._tensors: dict[int, torch.Tensor] = {}
        self._read: dict[int, str] = {}
        self._alive: list[Any] = []
        self._open: dict[int, int] = {}
        self._owners: list[str] = []
        self._classes: dict[type, None] = {}
        self._by_name: dict[str, torch.nn.Module] = {}
        self._packages: set[str] = {"torch"}
        self._reached: set[str] = set(_CALLED)
        self._reaches_all = False
        self._tensor_names: dict[int, str] | None = None

    def read(self, modules: Mapping[str, torch.nn.Module], whole: Container[str]) -> Settings:
        parts = [f"{name}:{self._module(name, module, name in whole)}" for name, module in modules.items()]
        parts += sorted(self._all_reached())
        parts += [f"{package}=={_version(package)}" for package in sorted(self._packages)]
        return Settings(_hashed(parts), list(self._tensors.values()))

    def value(self, value: Any) -> str:
        """A description that is equal for equal values, of another run too."""
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        key = id(value)
        if key in self._read:
            return self._read[key]
        if key in self._open:
            return f"^{len(self._open) - self._open[key]}"  # it holds itself, so many levels above
        if len(self._open) >= _DEEPEST:
            return self._unreadable(value)
        self._open[key] = len(self._open)
        self._alive.append(value)
        try:
            text = self._described(value)
        finally:
            del self._open[key]
        self._read[key] = text = text if len(text) <= 64 and "\0" not in text else _hashed([text])
        return text

    def _described(self, value: Any) -> str:
        if type(value) in _CONTAINERS:
            return "\0".join(self._contents(value))
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.nn.Module):
            name = self._reader.names.get(id(value))
            return self._hidden(value) if name is None else f"module {name!r}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            if self._package(getattr(value.__func__, "__module__", None)) == "gtflops":
                return f"method {value.__func__.__qualname__}"  # a hook of this package, which computes nothing
            return self._list("method", (value.__func__, value.__self__))
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__ if not isinstance(value.__self__, types.ModuleType) else None
            return self._list(f"builtin {value.__module__}.{value.__qualname__}", (owner,))
        if isinstance(value, _WRAPPERS):
            return self._list(type(value).__name__, (value.__wrapped__,))
        if isinstance(value, property):
            return self._list("property", (value.fget,))
        if isinstance(value, functools.cached_property):
            return self._list("property", (value.func,))
        if isinstance(value, (functools.partial, functools.partialmethod)):
            return self._list("partial", (value.func, value.args, value.keywords))
        if isinstance(value, types.MappingProxyType):
            return self._mapping("mappingproxy", value.items())
        if isinstance(value, types.ModuleType):
            return f"package {value.__name__}"
        if isinstance(value, weakref.ref):
            return self._list("reference", (value(),))
        if isinstance(value, (*_BY_REPR, *_BY_NAME)):
            return f"{type(value).__name__} {value if isinstance(value, _BY_REPR) else _name_of(value)}"
        if isinstance(value, enum.Enum):
            return self._list(f"{self._class(type(value))}.{value.name}", (value.value,))
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value))
        if isinstance(value, torch.autocast):  # which keeps what it found when it was entered
            return self._list("autocast", (value.device, value.fast_dtype, value._enabled, value._cache_enabled))
        if _is_of(value, "transformers.configuration_utils"):
            return self._configuration(value)
        return self._object(value)

    def _list(self, kind: str, values: Iterable[Any]) -> str:
        return "\0".join([kind, *map(self.value, values)])

    def _mapping(self, kind: str, items: Iterable[tuple[Any, Any]]) -> str:
        return self._list(kind, (inner for item in items for inner in item))

    def _object(self, value: Any) -> str:
        cls = type(value)
        if cls is object:
            return "object"
        is_known = self._package(cls.__module__) in sys.stdlib_module_names
        if is_known:
            try:
                reduce = copyreg.dispatch_table.get(cls)
                reduced = reduce(value) if reduce else value.__reduce_ex__(4)
            except Exception:  # whatever a class refuses by
                return self._unreadable(value)
        elif not _is_of_python(cls):
            return self._unreadable(value)
        self._owners.append(f"a {cls.__qualname__}")
        if is_known:
            text = self._list(self._class(cls), (_without_iterators(reduced),))
        else:
            text = self._mapping("\0".join([self._class(cls), *self._contents(value)]), _state(value))
        self._owners.pop()
        return text

    def _contents(self, value: Any) -> Iterator[str]:
        """What an object holds as the built-in container, number or text that it is."""
        if isinstance(value, dict):
            yield self._mapping("dict", dict.items(value))
        elif isinstance(value, list):
            yield self._list("list", list.__iter__(value))
        elif isinstance(value, tuple):
            yield self._list("tuple", tuple.__iter__(value))
        elif isinstance(value, (set, frozenset)):
            yield "\0".join(["set", *sorted(map(self.value, value))])
        elif isinstance(value, (int, float, str, bytes)):
            base = next(base for base in (int, float, str, bytes) if isinstance(value, base))
            yield f"{base.__name__} {base.__repr__(value)}"

    def _module(self, name: str, module: torch.nn.Module, whole: bool) -> str:
        """Without its tensors, and its submodules but for those that the model did not have.

        Of what is in front of the blocks or around them, attributes are read by the names that code reaches: a model
        may have its optimizer and its trainer as attributes.
        """
        self._owners.append(name or "the model")
        parts = [self.value(type(module))]
        self._classes[type(module)] = None
        own = vars(module)
        if not whole and all(
            base in (torch.nn.Module, object) or self._package(base.__module__) != "torch"
            for base in type(module).__mro__
        ):
            self._by_name[name] = module
        elif not isinstance(module, torch._dynamo.OptimizedModule):  # all that one computes is its submodule's
            parts += [f"{key}\0{self.value(own[key])}" for key in sorted(own.keys() - _not_of(module))]
        parts += [self._list(hooks, own[hooks].values()) for hooks in _HOOKS if own[hooks]]
        if whole:
            parts.append(self._mapping("submodules", module._modules.items()))
        self._owners.pop()
        return _hashed(parts)

    def _hidden(self, module: torch.nn.Module) -> str:
        """A module that is not among the model's: in a list of Python, or put into it later."""
        its_tensors = {**module._parameters, **module._buffers}
        return f"{self._module(type(module).__name__, module, True)}\0{self._mapping('tensors', its_tensors.items())}"

    def _tensor(self, tensor: torch.Tensor) -> str:
        if self._tensor_names is None:
            model = self._reader.model
            named = (*model.named_parameters(), *model.named_buffers())
            self._tensor_names = {id(tensor): name for name, tensor in named}
        if id(tensor) in self._tensor_names:
            return f"tensor {self._tensor_names[id(tensor)]}"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout != torch.strided:
            return self._unreadable(tensor)
        header = header_of(tensor.device.type, tensor).decode()
        if tensor.is_meta:
            return header
        self._tensors[id(tensor)] = tensor
        return f"{header}{len(self._tensors)}"

    def _array(self, array: np.ndarray[Any, Any]) -> str:
        if array.dtype.hasobject:
            return self._list(f"array {array.shape}", array.ravel().tolist())
        return f"array {array.dtype.str}{array.shape} {hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}"

    def _configuration(self, config: Any) -> str:
        """Of transformers; with the implementation of attention, which it keeps apart, and the function that it is."""
        items = [
            (key, value)
            for key, value in sorted(vars(config).items())
            if key not in _OF_NO_EFFECT_IN_CONFIGURATIONS
            and (not key.startswith("_") or key.endswith("_implementation_internal"))
        ]
        attention = getattr(config, "_attn_implementation", None)
        known = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
        function = known.get(attention) if isinstance(attention, str) else None
        return self._mapping(self._class(type(config)), [*items, ("attention", function)])

    def _class(self, cls: type) -> str:
        """By its name, and, where it is the user's, by its code, which is read in the end."""
        package = self._package(cls.__module__)
        self._packages.add(package)
        if not self._is_installed(cls.__module__):
            self._classes[cls] = None
        return f"{cls.__module__}.{cls.__qualname__}"

    def _function(self, function: types.FunctionType) -> str:
        module = function.__globals__.get("__name__")
        package = self._package(module)
        self._packages.add(package)
        if package == "gtflops":
            return f"function {function.__qualname__}"
        is_installed = self._is_installed(module)
        cells = [self._of_package(cell) if is_installed else self.value(cell) for cell in _cells(function)]
        if package in _KNOWN:
            return "\0".join([f"function {function.__module__}.{function.__qualname__}", *cells])
        code = _code_of(function.__code__)
        self._reached |= code.names
        parts = [f"function {code.digest}", *cells]
        if not is_installed:
            self._reaches_all |= not _REACHES_ALL.isdisjoint(code.names)
            self._owners.append(function.__qualname__)
            parts.append(self._mapping("own", sorted(vars(function).items())))
        parts.append(self._list("defaults", (function.__defaults__, function.__kwdefaults__)))
        found = {name: function.__globals__[name] for name in code.globals if name in function.__globals__}
        if not is_installed:
            found |= {name: sys.modules[name] for name in code.imports if name in sys.modules}
        parts += [f"{name}\0{self._global(its, code.names, is_installed, set())}" for name, its in found.items()]
        if not is_installed:
            self._owners.pop()
        return "\0".join(parts)

    def _global(self, value: Any, names: frozenset[str], is_installed: bool, seen: set[int]) -> str:
        """What code finds by a global name; of a module, by the further ``names`` in the code."""
        if isinstance(value, types.ModuleType):
            if id(value) in seen:
                return value.__name__
            seen.add(id(value))
            is_installed = self._is_installed(value.__name__)
            its = vars(value)
            inner = sorted(names & its.keys())
            return "\0".join(
                [value.__name__, *(f"{name}\0{self._global(its[name], names, is_installed, seen)}" for name in inner)]
            )
        function = getattr(value, "__func__", value)
        if is_installed and isinstance(value, _OF_C) and not isinstance(function, types.FunctionType):
            return f"builtin {_name_of(function)}"  # a method of an object of C too, as in numpy.random
        return self.value(value) if not is_installed or isinstance(value, (*_FUNCTIONS, type)) else ""

    def _of_package(self, value: Any) -> str:
        """In a closure of an installed package, which may hold what its version says enough of: locks, say."""
        is_read = isinstance(value, (*_PLAIN, *_FUNCTIONS, *_CONTAINERS, type)) or hasattr(value, "__dict__")
        return self.value(value) if is_read else type(value).__qualname__

    def _all_reached(self) -> Iterator[str]:
        """Methods and attributes of classes and modules that code reaches, which may reach more."""
        done: set[tuple[type | str, str]] = set()
        before = -1
        while len(done) != before:
            before = len(done)
            for path, module in self._by_name.items():
                its = vars(module)
                for name in sorted(its.keys() - _not_of(module)):
                    if (path, name) not in done and (self._reaches_all or name in self._reached):
                        done.add((path, name))
                        self._owners.append(path or "the model")
                        yield f"{path}.{name}\0{self.value(its[name])}"
                        self._owners.pop()
            bases = dict.fromkeys(base for cls in list(self._classes) for base in cls.__mro__)
            for base in bases:
                is_installed = self._is_installed(base.__module__)
                own = dict(vars(base))
                if self._package(base.__module__) in _KNOWN:  # only what another package has put there
                    own = {name: own[name] for name in _CALLED & own.keys() if not self._is_known(own[name])}
                for name in sorted(own if not is_installed else self._reached & own.keys()):
                    if (base, name) in done or not (name in self._reached or self._is_reached(name, own[name])):
                        continue
                    done.add((base, name))
                    is_read = not is_installed or isinstance(own[name], (*_PLAIN, *_FUNCTIONS, property))
                    self._owners.append(f"the class {base.__qualname__}")
                    yield f"{base.__module__}.{base.__qualname__}.{name}\0{self.value(own[name]) if is_read else ''}"
                    self._owners.pop()

    def _is_known(self, value: Any) -> bool:
        found = getattr(value, "__globals__", None)
        return found is None or self._package(found.get("__name__")) in _KNOWN

    def _is_reached(self, name: str, value: Any) -> bool:
        """Whether an attribute of a class of the user's is reached without its name: by an operator, or at run time."""
        if name.startswith("__") and name.endswith("__"):
            return name not in ("__init__", "__new__") and isinstance(value, (*_FUNCTIONS, property))
        return self._reaches_all

    def _package(self, module: str | None) -> str:
        return (module or "").partition(".")[0]

    def _is_installed(self, module: str | None) -> bool:
        """Whether it is of a package whose version says what is in it."""
        if self._package(module) in _KNOWN:
            return True
        file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
        return "site-packages" in file or "dist-packages" in file

    def _unreadable(self, value: Any) -> str:
        return f"unreadable {self._reader.number_of(value, self._owners[-1] if self._owners else 'the model')}"


class _Code(NamedTuple):
    """``names`` are all that the code looks up, or may by a text in it; ``globals`` those that it looks up as such, and
    ``imports`` modules."""

    digest: str
    globals: tuple[str, ...]
    imports: tuple[str, ...]
    names: frozenset[str]


@functools.cache
def _code_of(code: types.CodeType) -> _Code:
    """With the code of functions in it; without lines and files."""
    inner = [_code_of(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    found = [(item.opname, item.argval) for item in dis.get_instructions(code)]
    own = {name for operation, name in found if operation in ("LOAD_GLOBAL", "LOAD_NAME")}
    imported = {name for operation, name in found if operation == "IMPORT_NAME"}
    texts = {value for value in code.co_consts if isinstance(value, str) and value.isidentifier()}
    parts = [
        code.co_code.hex(),
        code.co_exceptiontable.hex(),
        repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)),
        repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)),
        *(_constant(value) for value in code.co_consts if not isinstance(value, types.CodeType)),
        *(its.digest for its in inner),
    ]
    return _Code(
        _hashed(parts),
        tuple(sorted(own.union(*(its.globals for its in inner)))),
        tuple(sorted(imported.union(*(its.imports for its in inner)))),
        frozenset(texts.union(code.co_names, *(its.names for its in inner))),
    )


def _constant(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"set {sorted(map(_constant, value))}"
    if isinstance(value, tuple):
        return f"tuple {list(map(_constant, value))}"
    return f"{type(value).__name__} {value!r}"


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing was assigned yet
            yield None


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object by name; not those that a cached property left, which are there once it was read."""
    cls = type(value)
    for name, inner in sorted(getattr(value, "__dict__", {}).items()):
        if not isinstance(getattr(cls, name, None), functools.cached_property):
            yield name, inner
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            is_private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{slot}" if is_private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _is_of_python(cls: type) -> bool:
    """Whether all that its objects hold is in attributes, or in the container, number or text that they are."""
    bases = cls.__mro__[:-1]
    return all(base.__flags__ & _HEAP_TYPE or issubclass(base, _CONTAINERS) for base in bases) and (
        cls.__dictoffset__ != 0 or any("__slots__" in vars(base) for base in bases) or issubclass(cls, _CONTAINERS)
    )


def _without_iterators(reduced: Any) -> Any:
    """What ``__reduce_ex__`` gives: a text, or a tuple whose last items may be iterators."""
    if not isinstance(reduced, tuple):
        return reduced
    return tuple(list(item) if isinstance(item, Iterator) else item for item in reduced)


def _not_of(module: torch.nn.Module) -> frozenset[str]:
    """Attributes of the module that are no settings of its own."""
    return _OF_EVERY_MODEL if _is_of(module, "transformers.modeling_utils") else _OF_EVERY_MODULE


def _is_of(value: Any, module: str) -> bool:
    """Whether a class of the module is among those of the value."""
    return any(base.__module__ == module for base in type(value).__mro__)


def _name_of(value: Any) -> str:
    return str(value) if not hasattr(value, "__qualname__") else str(value.__qualname__)


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", ""))


def _hashed(parts: Iterable[str]) -> str:
    return hashlib.sha256("\1".join(parts).encode(errors="surrogatepass")).hexdigest()
