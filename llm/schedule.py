"""Who waits, who runs, who is next and who has to give way. Knows no thread, no runner and no clock."""

import math
from collections import Counter
from collections.abc import Hashable
from itertools import count
from typing import Generic

from llm.generation import Generation
from llm.job import Job
from llm.runner import S
from llm.turns import Turns


class Schedule(Generic[S]):
    """All requests of an engine, each either waiting or running.

    Turns go round between callers, and callers that have no slot come first. If there is none for such a caller, the
    one that has the most gives up that of its youngest request, which waits in front of its others. Nobody is asked for
    its only one, so callers cannot take slots from each other in turn: it happens only when one goes from none to one.
    """

    def __init__(self) -> None:
        self.running: dict[Job[S], S] = {}
        """Those that have a slot, in the order in which they got it."""
        self._jobs: dict[Generation, Job[S]] = {}  # all, the oldest first
        self._waiting: Turns[Job[S]] = Turns()
        self._next_deadline = math.inf  # none ends sooner
        self._turns = count(1)

    @property
    def num_waiting(self) -> int:
        """How many wait, those among them that had to give way."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """True if anybody waits or runs."""
        return bool(self._jobs)

    def add(self, job: Job[S]) -> None:
        """Let a new request wait."""
        self._jobs[job.generation] = job
        self._waiting.push(job.caller, job)
        self._next_deadline = min(self._next_deadline, job.deadline)

    def next(self) -> Job[S] | None:
        """The waiting request whose turn it is."""
        return self._waiting.peek(served={job.caller for job in self.running})

    def enter(self, job: Job[S], sequence: S) -> bool:
        """Let a request run that was next. False if it was cancelled in the meantime."""
        if not self._waiting.take(job.caller, job):
            return False
        job.turn = next(self._turns)
        self.running[job] = sequence
        return True

    def next_to_read(self, budget: int) -> tuple[Job[S], S] | None:
        """The running request that reads the next piece of its prompt; after that it is other callers' turn.

        None if nobody has to, or if the piece has more tokens than that: it keeps its turn.
        """
        reading = [job for job, sequence in self.running.items() if sequence.num_to_read]
        if not reading:
            return None
        turns: dict[Hashable, int] = {}
        for job in self.running:
            turns[job.caller] = max(turns.get(job.caller, 0), job.turn)
        job = min(reading, key=lambda job: turns[job.caller])
        if self.running[job].num_to_read > budget:
            return None
        job.turn = next(self._turns)
        return job, self.running[job]

    def gives_way(self) -> Job[S] | None:
        """The running request that pauses when memory runs out; None if it would be the only one."""
        return self._youngest_of_most() if len(self.running) > 1 else None

    def gives_way_to(self, job: Job[S]) -> Job[S] | None:
        """The running request that pauses so that a waiting one can run; None if that one's caller can wait."""
        callers = [other.caller for other in self.running]
        is_poor, has_rich = job.caller not in callers, len(set(callers)) < len(callers)
        return self._youngest_of_most() if is_poor and has_rich else None

    def pause(self, job: Job[S]) -> None:
        """Let a running request wait again, in front of its caller's others."""
        del self.running[job]
        if job.generation.is_ended:  # it was cancelled when it was not yet waiting, and `forget` will not come again
            del self._jobs[job.generation]
        else:
            self._waiting.push_front(job.caller, job)

    def leave(self, job: Job[S]) -> None:
        """Be done with a request, wherever it is."""
        self.running.pop(job, None)
        self._waiting.remove(job.caller, job)
        self._jobs.pop(job.generation, None)

    def forget(self, generation: Generation) -> None:
        """Be done with a request if it waits. One that runs has to be released first."""
        job = self._jobs.get(generation)
        if job is not None and job not in self.running:
            self.leave(job)

    def clear(self) -> list[Generation]:
        """Be done with all requests."""
        generations = list(self._jobs)
        self._jobs.clear()
        self._waiting.clear()
        self.running.clear()
        return generations

    def late(self, now: float) -> list[Generation]:
        """Those whose time is up. Looks through all of them only when a deadline has passed."""
        if now < self._next_deadline:
            return []
        self._next_deadline = min((job.deadline for job in self._jobs.values() if job.deadline > now), default=math.inf)
        return [generation for generation, job in self._jobs.items() if job.deadline <= now]

    def _youngest_of_most(self) -> Job[S]:
        """The last that came, of the caller that has the most slots."""
        num_slots = Counter(job.caller for job in self.running)
        most = max(num_slots.values())
        return max((job for job in self.running if num_slots[job.caller] == most), key=lambda job: job.number)
