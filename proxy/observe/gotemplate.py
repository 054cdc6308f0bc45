"""Go's text/template, as far as a request log has a use for it (contract section 3.13).

A template is parsed once, into closures that are called for each line. Owns the syntax; what the
closures do, functions and values have modules of their own. Everything that can go wrong is a
TemplateError, and when the template is parsed it says where. Whoever writes a template runs the
revision, so it is not an attacker's; still none loops or grows without end.
"""

from __future__ import annotations

from typing import Any

from weir.proxy.observe.gofuncs import FUNCTIONS, SHORT_CIRCUITS
from weir.proxy.observe.gorun import (
    DEEPEST,
    Apply,
    Bodies,
    Eval,
    Frame,
    Run,
    assign,
    chain,
    command_of,
    constant,
    dot,
    fields_of,
    if_,
    include,
    no_command,
    nothing,
    piped,
    print_,
    range_,
    say,
    skip,
    stop,
    with_,
)
from weir.proxy.observe.gotokens import KEYWORDS, Token, fault, number, tokens, unquoted
from weir.proxy.observe.govalues import TemplateError


class Template:
    """`Template(text).render(data)`. Both raise TemplateError."""

    def __init__(self, source: str) -> None:
        self.bodies: Bodies = {}
        parser = _Parser(source, self.bodies)
        self._body, self._slots = parser.template()

    def render(self, data: Any) -> str:
        out: list[str] = []
        frame = Frame(data, out, self._slots, 0)
        for step in self._body:
            step(frame)
        return "".join(out)


# --- syntax ------------------------------------------------------------------------------------
class _Parser:
    """One pass over the tokens. `scope` holds the variables that can be seen, innermost last."""

    def __init__(self, source: str, bodies: Bodies) -> None:
        self.source = source
        self.tokens = tokens(source)
        self.at = 0
        self.bodies = bodies
        self.scope: list[tuple[str, int]] = [("$", 0)]
        self.slots = 1
        self.loops = 0
        self.depth = 0

    def template(self) -> tuple[list[Run], int]:
        body, ended = self._list(top=True)
        if ended.kind != "end_of_template":
            raise self._fault(ended, f"unexpected {{{{{ended.kind}}}}}")
        return body, self.slots

    # --- tokens
    def _peek(self) -> Token:
        return self.tokens[self.at]

    def _next(self) -> Token:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def _next_word(self) -> Token:
        while self._peek().kind == "space":
            self.at += 1
        return self._next()

    def _peek_word(self) -> Token:
        while self._peek().kind == "space":
            self.at += 1
        return self._peek()

    def _fault(self, token: Token, why: str) -> TemplateError:
        return fault(self.source, token.at, why)

    def _unexpected(self, token: Token, where: str) -> TemplateError:
        return self._fault(token, f"unexpected {token.value!r} in {where}")

    def _deeper(self, token: Token) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._fault(token, f"nested more than {DEEPEST} deep")

    # --- statements
    def _list(self, top: bool = False) -> tuple[list[Run], Token]:
        """Until {{end}}, {{else}} or the end of the template, which is returned."""
        body: list[Run] = []
        while True:
            token = self._next()
            if token.kind == "text":
                body.append(say(token.value))
            elif token.kind == "end":
                if not top:
                    raise self._fault(token, "unexpected EOF: an {{end}} is missing")
                return body, token._replace(kind="end_of_template")
            else:
                first = self._peek_word()
                if first.kind in ("end", "else"):
                    self._next()
                    if first.kind == "end":
                        self._right("end")
                    return body, first
                if first.kind == "define":
                    if not top or self.depth:
                        raise self._fault(first, "unexpected {{define}}")
                    self._define()
                else:
                    body.append(self._statement(first))

    def _right(self, where: str) -> None:
        token = self._next_word()
        if token.kind != "right":
            raise self._unexpected(token, where)

    def _statement(self, first: Token) -> Run:
        kind = first.kind
        if kind in ("if", "with", "range"):
            self._next()
            return self._control(first)
        if kind in ("break", "continue") and self.loops:
            self._next()
            self._right(kind)
            return stop if kind == "break" else skip
        if kind in ("template", "block"):
            self._next()
            return self._template(first)
        if kind in ("break", "continue"):
            raise self._fault(first, f"{{{{{kind}}}}} outside {{{{range}}}}")
        value, declares = self._pipeline("command", "right")
        if declares:
            return value
        return print_(value)

    def _control(self, first: Token) -> Run:
        """if, with and range with all their branches."""
        self._deeper(first)
        seen = len(self.scope)
        kind = first.kind
        value, _, targets = self._pipeline_of(kind, "right")
        self.loops += kind == "range"
        body, ended = self._list()
        self.loops -= kind == "range"
        other: list[Run] = []
        if ended.kind == "else":
            follows = self._peek_word()
            if follows.kind == kind and kind in ("if", "with"):
                self._next()
                other = [self._control(follows)]
            else:
                self._right("else")
                other, ended = self._list()
                if ended.kind != "end":
                    raise self._fault(ended, "expected end; found {{else}}")
        del self.scope[seen:]
        self.depth -= 1
        if kind == "if":
            return if_(value, body, other)
        if kind == "with":
            return with_(value, body, other)
        return range_(value, targets, body, other)

    def _name(self, where: str) -> str:
        token = self._next_word()
        if token.kind not in ("string", "raw"):
            raise self._unexpected(token, where)
        return self._text(token)

    def _define(self) -> None:
        self._next()
        name = self._name("define clause")
        self._right("define clause")
        self._body_of(name)

    def _body_of(self, name: str) -> None:
        """The list that comes next becomes the template of that name, with a scope of its own."""
        outer = self.scope, self.slots, self.loops
        self.scope, self.slots, self.loops = [("$", 0)], 1, 0
        self.depth += 1
        body, ended = self._list()
        self.depth -= 1
        if ended.kind != "end":
            raise self._fault(ended, "unexpected {{else}} in define clause")
        self.bodies[name] = body, self.slots
        self.scope, self.slots, self.loops = outer

    def _template(self, first: Token) -> Run:
        where = f"{first.kind} clause"
        name = self._name(where)
        value: Eval = nothing
        if first.kind == "block" or self._peek_word().kind != "right":
            value, _ = self._pipeline(where, "right")
        else:
            self._next()
        if first.kind == "block":
            self._deeper(first)
            self._body_of(name)
            self.depth -= 1
        return include(name, self.bodies, value)

    # --- expressions
    def _pipeline(self, where: str, end: str) -> tuple[Eval, bool]:
        value, declares, _ = self._pipeline_of(where, end)
        return value, declares

    def _pipeline_of(self, where: str, end: str) -> tuple[Eval, bool, list[int]]:
        """Its value, whether it sets variables, and where to."""
        names, assigns = self._variables(where)
        commands: list[Apply] = []
        while True:
            token = self._next_word()
            if token.kind == end:
                break
            if token.kind in ("right", "close", "pipe", "comma", "end", "assign", "declare"):
                raise self._unexpected(token, where)
            self.at -= 1
            commands.append(self._command(bool(commands), len(commands) + 1))
        if not commands:
            raise self._fault(token, f"missing value for {where}")
        value: Eval = commands[0] if len(commands) == 1 else piped(commands)
        if not names:
            return value, False, []
        targets = [self._target(name, assigns) for name in names]
        return assign(value, targets), True, targets

    def _variables(self, where: str) -> tuple[list[Token], bool]:
        """`$x :=`, `$x =`, or in a range `$i, $x :=`."""
        names: list[Token] = []
        start = self.at
        while self._peek_word().kind == "variable":
            names.append(self._next())
            follows = self._peek_word()
            if follows.kind in ("declare", "assign"):
                self._next()
                return names, follows.kind == "assign"
            if follows.kind != "comma":
                break
            self._next()
            if where != "range" or len(names) > 1:
                raise self._fault(follows, f"too many declarations in {where}")
            if self._peek_word().kind not in ("variable", "right", "close"):
                raise self._fault(follows, "range can only initialize variables")
        self.at = start
        return [], False

    def _target(self, name: Token, assigns: bool) -> int:
        if assigns:
            return self._slot(name)
        self.scope.append((name.value, self.slots))
        self.slots += 1
        return self.slots - 1

    def _slot(self, name: Token) -> int:
        for known, slot in reversed(self.scope):
            if known == name.value:
                return slot
        raise self._fault(name, f"undefined variable {name.value!r}")

    def _command(self, piped: bool, stage: int) -> Apply:
        """`operand operand …` up to | or the end of the pipeline."""
        first = self._peek_word()
        function: str | None = None
        chained = False
        head: Eval = nothing
        names: list[str] = []
        if first.kind == "name":
            self._next()
            function = first.value
            if function not in FUNCTIONS and function not in SHORT_CIRCUITS:
                raise self._fault(first, f"function {function!r} not defined")
            names = self._fields()
            if names:  # the fields of what it returns: the function itself is given nothing
                head = command_of(function, [])
                function, chained = None, True
        elif first.kind == "nil":
            self._next()
            head = no_command
        else:
            head, names = self._operand()
        if piped and first.kind in ("true", "false", "dot", "number", "char", "string", "raw"):
            raise self._fault(first, f"non executable command in pipeline stage {stage}")
        arguments: list[Eval] = []
        while True:
            token = self._next()
            if token.kind == "space":
                if self._peek_word().kind not in ("pipe", "right", "close"):
                    if self._peek().kind in ("comma", "assign", "declare", "end"):
                        raise self._unexpected(self._peek(), "operand")
                    arguments.append(self._argument())
                continue
            if token.kind in ("right", "close"):
                self.at -= 1
            elif token.kind != "pipe":
                raise self._unexpected(token, "operand")
            break
        if function is not None:
            return command_of(function, arguments)
        if names and not chained:
            return chain(head, names, arguments)
        return constant(fields_of(head, names) if names else head, arguments, first.value)

    def _argument(self) -> Eval:
        token = self._peek_word()
        if token.kind == "name":
            self._next()
            if token.value not in FUNCTIONS and token.value not in SHORT_CIRCUITS:
                raise self._fault(token, f"function {token.value!r} not defined")
            called: Eval = command_of(token.value, [])
            return fields_of(called, self._fields())
        value, names = self._operand()
        return fields_of(value, names)

    def _fields(self) -> list[str]:
        names = []
        while self._peek().kind == "field":
            names.append(self._next().value[1:])
        return names

    def _operand(self) -> tuple[Eval, list[str]]:
        """A term, and the fields behind it."""
        token = self._next()
        kind = token.kind
        if kind == "field":
            return dot, [token.value[1:], *self._fields()]
        if kind == "variable":
            slot = self._slot(token)
            return lambda frame: frame.slots[slot], self._fields()
        if kind == "open":
            self._deeper(token)
            value, _ = self._pipeline("parenthesized pipeline", "close")
            self.depth -= 1
            return value, self._fields()
        constant: Any = None
        if kind in ("string", "raw"):
            constant = self._text(token)
        elif kind in ("number", "char"):
            constant = self._number(token)
        elif kind in ("true", "false"):
            constant = kind == "true"
        elif kind not in ("nil", "dot"):
            raise self._unexpected(token, "operand" if kind not in KEYWORDS else "command")
        if self._peek().kind == "field":
            raise self._fault(token, f"unexpected . after term {token.value!r}")
        return (dot if kind == "dot" else lambda _: constant), []

    def _text(self, token: Token) -> str:
        try:
            return unquoted(token.value)
        except ValueError as error:
            raise self._fault(token, f"{token.value}: {error}") from None

    def _number(self, token: Token) -> int | float:
        try:
            return number(token.value)
        except ValueError as error:
            raise self._fault(token, str(error)) from None
