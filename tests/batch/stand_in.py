"""A model of a few lines for the tests of the batch; its text depends on the request alone."""

import hashlib
from collections import deque

from mmx.engine.request import Event, Result, Timings, TokenLogprob
from mmx.errors import UserError


class StandIn:
    """Answers several requests at once and finishes them out of order, as an engine does."""

    name = "stand-in"

    def __init__(self, room=3, limit=1000, stop_after=None):
        self.room, self.limit, self.stop_after = room, limit, stop_after
        self.answered = []

    def encode(self, job):
        ids = list(job.prompt_ids or (job.prompt or str(job.messages)).encode())
        if len(ids) > self.limit:
            raise UserError(f"The prompt has {len(ids)} tokens.", f"At most {self.limit} fit.")
        return ids

    def run(self, requests):
        held = deque()
        for request in requests:
            held.append(request)
            if len(held) == self.room:
                held.rotate(1)
                yield self._finish(held.pop())
        while held:
            yield self._finish(held.pop())

    def _finish(self, request):
        if len(self.answered) == self.stop_after:
            raise KeyboardInterrupt
        self.answered.append(request.key)
        text = f"{request.prompt_ids} {request.sampling}"
        ids = list(hashlib.sha256(text.encode()).digest()[:request.sampling.max_tokens])
        logprobs = None
        if request.sampling.logprobs:
            logprobs = [TokenLogprob(id, -0.5, ((id, -0.5), (7, -1.5))) for id in ids]
        return Event(request.key, "", ids, Result(
            "".join(f"{id:02x}" for id in ids), ids, "length", logprobs, len(request.prompt_ids),
            Timings(0.0, 0.0, 0.0, len(ids))))

    def token_bytes(self, id):
        return f"{id:02x}".encode()

    def tool_calls(self, job, text):
        if not job.tools:
            return None
        return [{"id": "call_0", "type": "function",
                 "function": {"name": job.tools[0]["function"]["name"], "arguments": "{}"}}]
