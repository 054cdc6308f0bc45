"""What a parsed template of Go does: closures over one rendering's state, a Frame.

Owns control flow, the walk along fields and methods, and the limits that end what would not end.
Which closure stands for which syntax is decided by the parser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

from weir.proxy.observe.gofmt import shown
from weir.proxy.observe.gofuncs import FUNCTIONS, SHORT_CIRCUITS, Function, printable
from weir.proxy.observe.govalues import (
    Map,
    Method,
    Nil,
    Struct,
    TemplateError,
    Unsupported,
    is_true,
    octets,
    type_name,
)

DEEPEST = 50
_MOST_STEPS = 100_000
_LONGEST = 1 << 20


class Frame:
    """One rendering: `slots` are the variables, `$` first."""

    __slots__ = ("depth", "dot", "out", "size", "slots", "steps")

    def __init__(self, dot: Any, out: list[str], slots: int, depth: int) -> None:
        self.dot = dot
        self.out = out
        self.slots: list[Any] = [None] * slots
        self.slots[0] = dot
        self.depth = depth
        self.steps = self.size = 0


Eval = Callable[[Frame], Any]
Run = Callable[[Frame], None]


class Apply(Protocol):
    """A command that is given the result of the one before it, if there is one."""

    def __call__(self, frame: Frame, last: Sequence[Any] = (), /) -> Any: ...


Bodies = dict[str, tuple[list[Run], int]]
"""Templates by name: what they do, and how many slots they need."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


# --- what closures do ------------------------------------------------------------------------
class _Getters(dict[type, dict[str, Callable[[Any], Any]]]):
    """How fields, and methods without arguments, are read from the structs that there are."""

    def __missing__(self, kind: type) -> dict[str, Callable[[Any], Any]]:
        known: dict[str, Callable[[Any], Any]] = {}
        if issubclass(kind, Struct):
            for name in kind.go_fields:
                known[name] = attrgetter(name)
            for name, method in kind.go_methods.items():
                known.pop(name, None)
                if not method.parameters:
                    known[name] = method.call
        self[kind] = known
        return known


_GETTERS = _Getters()


def _field(receiver: Any, name: str, arguments: list[Any]) -> Any:
    """A field, a method's result or a map's value."""
    if receiver is None:
        return None
    if isinstance(receiver, Struct | Map):
        method = receiver.go_methods.get(name)
        if method is not None:
            return _method(receiver, name, method, arguments)
        if isinstance(receiver, Map):
            if arguments:
                raise TemplateError(f"{name} is not a method but has arguments")
            return receiver.get(name)
        if name in receiver.go_fields:
            if arguments:
                raise TemplateError(f"{name} has arguments but cannot be invoked as function")
            return getattr(receiver, name)
    if isinstance(receiver, Nil):
        raise TemplateError(f"nil pointer evaluating {receiver.go_type}.{name}")
    raise TemplateError(f"can't evaluate field {name} in type {type_name(receiver)}")


def _method(receiver: Any, name: str, method: Method, arguments: list[Any]) -> Any:
    wanted = method.parameters
    if len(arguments) != len(wanted):
        raise TemplateError(
            f"wrong number of args for {name}: want {len(wanted)} got {len(arguments)}"
        )
    for value, type_ in zip(arguments, wanted, strict=True):
        if type_name(value) != type_:
            raise TemplateError(f"wrong type for value; expected {type_}; got {type_name(value)}")
    return method.call(receiver, *arguments)


def _apply(name: str, function: Function, arguments: list[Any]) -> Any:
    count = len(arguments)
    most = function.most
    if count < function.least or (most is not None and count > most):
        want = f"want {most}" if most is not None else f"want at least {function.least}"
        raise TemplateError(f"wrong number of args for {name}: {want} got {count}")
    if function.first and type_name(arguments[0]) != function.first:
        raise TemplateError(f"expected {function.first}; found {type_name(arguments[0])}")
    try:
        return function.call(*arguments)
    except TemplateError as error:
        raise type(error)(f"error calling {name}: {error}") from None


def _items(value: Any, two: bool) -> list[tuple[Any, Any]]:
    if isinstance(value, int) and not isinstance(value, bool):
        if two:
            raise TemplateError(f"can't use {value} to iterate over more than one variable")
        if value > _MOST_STEPS:
            raise Unsupported(f"range over {value} takes too long")
        return [(None, type(value)(index)) for index in range(value)]
    if isinstance(value, list):
        return list(enumerate(value))
    if isinstance(value, Map):
        return [(key, value[key]) for key in sorted(value, key=octets)]
    if value is None:
        return []
    raise TemplateError(f"range can't iterate over {type_name(value)}")


def say(text: str) -> Run:
    return lambda frame: frame.out.append(text)


def nothing(_: Frame) -> None:
    return None


def no_command(_: Frame) -> Any:
    raise TemplateError("nil is not a command")


def dot(frame: Frame) -> Any:
    return frame.dot


def print_(value: Eval) -> Run:
    def run(frame: Frame) -> None:
        result = value(frame)
        frame.out.append(result if type(result) is str else shown(printable(result)))

    return run


def assign(value: Eval, targets: list[int]) -> Eval:
    def run(frame: Frame) -> Any:
        result = value(frame)
        for target in targets:
            frame.slots[target] = result
        return result

    return run


def include(name: str, bodies: Bodies, value: Eval) -> Run:
    """{{template}}: the body is looked up late, because it may be defined further down."""

    def run(frame: Frame) -> None:
        dot = value(frame)
        if name not in bodies:
            raise TemplateError(f"template {name!r} not defined")
        if frame.depth >= DEEPEST:
            raise Unsupported(f"templates include each other more than {DEEPEST} deep")
        body, slots = bodies[name]
        inner = Frame(dot, frame.out, slots, frame.depth + 1)
        inner.steps, inner.size = frame.steps + 1, frame.size
        for step in body:
            step(inner)
        frame.steps, frame.size = inner.steps, inner.size
        _check(frame)

    return run


def stop(_: Frame) -> None:
    raise _Break


def skip(_: Frame) -> None:
    raise _Continue


def if_(value: Eval, body: list[Run], other: list[Run]) -> Run:
    def run(frame: Frame) -> None:
        for step in body if is_true(value(frame)) else other:
            step(frame)

    return run


def with_(value: Eval, body: list[Run], other: list[Run]) -> Run:
    def run(frame: Frame) -> None:
        result = value(frame)
        if not is_true(result):
            for step in other:
                step(frame)
            return
        dot, frame.dot = frame.dot, result
        try:
            for step in body:
                step(frame)
        finally:
            frame.dot = dot

    return run


def _check(frame: Frame) -> None:
    if frame.steps > _MOST_STEPS:
        raise Unsupported("the template takes too long")
    if frame.size > _LONGEST or len(frame.out) > _LONGEST:
        raise Unsupported("the line gets too long")


def range_(value: Eval, targets: list[int], body: list[Run], other: list[Run]) -> Run:
    def run(frame: Frame) -> None:
        items = _items(value(frame), len(targets) > 1)
        if not items:
            for step in other:
                step(frame)
            return
        dot = frame.dot
        try:
            for index, item in items:
                frame.dot = item
                if targets:
                    frame.slots[targets[-1]] = item
                    if len(targets) > 1:
                        frame.slots[targets[0]] = index
                mark = len(frame.out)
                try:
                    for step in body:
                        step(frame)
                except _Continue:
                    pass
                frame.steps += 1
                frame.size += sum(map(len, frame.out[mark:]))
                _check(frame)
        except _Break:
            pass
        finally:
            frame.dot = dot

    return run


def piped(commands: list[Apply]) -> Apply:
    def run(frame: Frame, last: Sequence[Any] = ()) -> Any:
        for command in commands:
            last = [command(frame, last)]
        return last[0]

    return run


def fields_of(value: Eval, names: list[str]) -> Eval:
    return chain(value, names, []) if names else value


def chain(value: Eval, names: list[str], arguments: list[Eval]) -> Apply:
    """`.A.B.Method argument…`: only the last one is given the arguments."""
    *path, method = names

    def run(frame: Frame, last: Sequence[Any] = (), /) -> Any:
        result = value(frame)
        for name in path if arguments or last else names:
            get = _GETTERS[type(result)].get(name)
            result = _field(result, name, []) if get is None else get(result)
        if arguments or last:
            given = [argument(frame) for argument in arguments]
            result = _field(result, method, [*given, *last])
        return result

    return run


def constant(value: Eval, arguments: list[Eval], what: str) -> Apply:
    def run(frame: Frame, last: Sequence[Any] = ()) -> Any:
        if arguments or last:
            raise TemplateError(f"can't give argument to non-function {what}")
        return value(frame)

    return run


def command_of(name: str, arguments: list[Eval]) -> Apply:
    if name in SHORT_CIRCUITS:
        return _short_circuit(name, SHORT_CIRCUITS[name], arguments)
    function = FUNCTIONS[name]

    def run(frame: Frame, last: Sequence[Any] = ()) -> Any:
        given = [argument(frame) for argument in arguments]
        given += last
        return _apply(name, function, given)

    return run


def _short_circuit(name: str, stop: bool, arguments: list[Eval]) -> Apply:
    def run(frame: Frame, last: Sequence[Any] = ()) -> Any:
        if not arguments and not last:
            raise TemplateError(f"wrong number of args for {name}: want at least 1 got 0")
        result: Any = None
        for argument in arguments:
            result = argument(frame)
            if is_true(result) == stop:
                return result
        return last[0] if last else result

    return run
