"""Where a run's wall time goes: goodput is the share of it that is spent in steps."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax

STEPS = "steps"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE = {
    "/jax/compilation_cache/cache_misses": "compiled",
    "/jax/compilation_cache/cache_hits": "cached",
}


class Stopwatch:
    """Charges every second to one part of a run; a part within another is not the other's.

    `programs` counts those that were "compiled" for the compile cache and those that were found there, "cached";
    "recompiled" are those of both kinds that a step after the first needed, where there should be none.
    """

    def __init__(self, part: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with the seconds of `part`."""
        self.seconds: collections.Counter[str] = collections.Counter()
        self.programs = dict.fromkeys(("compiled", "cached", "recompiled"), 0)
        self._clock, self._parts, self._since = clock, [part], clock()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        jax.monitoring.register_event_listener(self._counted)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Charges what happens within to `part`."""
        self._charge()
        self._parts.append(part)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def close(self) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._heard)
        jax.monitoring.unregister_event_listener(self._counted)

    def __str__(self) -> str:
        """One line: `Goodput 93%: 812 s of 870 s in steps; compiling 30 s, evaluation 15 s, ...`."""
        self._charge()
        total = sum(self.seconds.values())
        rest = [(part, s) for part, s in self.seconds.most_common() if part != STEPS and s >= 0.05]
        shown = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in rest)
        steps = self.seconds[STEPS]
        share = steps / total if total else 0.0
        return f"Goodput {share:.1%}: {steps:.1f} s of {total:.1f} s in steps; {shown or 'no rest'}"

    def _charge(self) -> None:
        now = self._clock()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def _heard(self, event: str, duration: float, **_: object) -> None:
        if event == _COMPILED and self._parts[-1] == STEPS:
            self.programs["recompiled"] += 1

    def _counted(self, event: str, **_: object) -> None:
        if event in _CACHE:
            self.programs[_CACHE[event]] += 1
