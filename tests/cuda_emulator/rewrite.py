"""Rewrite CUDA C++ as the C++ that g++ compiles for the emulation."""

import re

LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<(?:[^<>;]|<[^<>;]*>)*>)?)\s*<<<(.+?)>>>\s*\(", re.DOTALL)
SHARED = re.compile(r"(?<!extern )__shared__\s+([\w:]+)\s+(\w+)\s*((?:\[[^\]]*\])*)\s*;")
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\s*\[\s*\]\s*;")
KERNEL = re.compile(r"\b__global__\b[^{]*\{")
ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")


def rewrite(text: str, name: str) -> str:
    """Return CUDA C++ as C++: launches, shared variables and inline PTX become calls of include/emulate.h.

    Every line keeps its number, and `name` is the file that messages and debug information name.
    """

    def keeping_lines(new: str, old: str) -> str:
        return new + "\n" * (old.count("\n") - new.count("\n"))

    def launch(match: re.Match[str]) -> str:
        kernel, config = match.groups()
        quoted = re.sub(r"\s+", " ", kernel)
        new = f'::emu::launcher("{quoted}", [](auto... a) {{ {quoted}(a...); }}, {config})('
        return keeping_lines(new, match[0])

    text = DYNAMIC_SHARED.sub(r"auto* const \2 = static_cast<\1*>(::emu::dynamic_shared());", text)
    text = SHARED.sub(r"auto& \2 = ::emu::shared_variable<\1\3>([] {});", text)
    text = LAUNCH.sub(launch, text)
    text = KERNEL.sub(r"\g<0> ::emu::kernel_entered([] { return __PRETTY_FUNCTION__; });", text)
    while found := ASM.search(text):
        inside, end = balanced(text, found.end())
        text = text[: found.start()] + keeping_lines(assembly(inside), text[found.start() : end]) + text[end:]
    return f'#line 1 "{name}"\n{text}'


def balanced(text: str, start: int) -> tuple[str, int]:
    """Return what is between a bracket that ends before `start` and its partner, and where that ends."""
    depth, at = 1, start
    while depth:
        if text[at] == '"':
            at = text.index('"', at + 1)
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1], at


def assembly(inside: str) -> str:
    """Return `"a.b %0, %1;" : "=f"(y) : "f"(x)` as `::ptx::a_b(y, x)`."""
    mnemonic = re.match(r'\s*"\s*([\w.]+)', inside)
    if mnemonic is None or inside.count(";") != 1:
        raise ValueError(f"not one PTX instruction: asm({inside})")
    operands = []
    for found in re.finditer(r'"[=+]?&?\w+"\s*\(', inside):
        if inside[: found.start()].count('"') % 2 == 0:
            operands.append(" ".join(balanced(inside, found.end())[0].split()))
    return f"::ptx::{mnemonic[1].replace('.', '_')}({', '.join(operands)})"
