"""Answer every record of a JSON Lines file; a killed run goes on where it stopped.

Records are {"id", "prompt" | "messages", sampling…} or OpenAI's batch requests. A record that
cannot be answered has an error in its place; the exit code is 1 when all have.
"""

import dataclasses
import json
from pathlib import Path

from mmx.batch import journal, records
from mmx.batch.run import run_batch
from mmx.cli.hosts import HostSettings, joined, spans_processes
from mmx.cli.interrupt import interruptible
from mmx.cli.settings import setting
from mmx.cli.shared import (
    EngineSettings,
    ModelSettings,
    SamplingSettings,
    check_output,
    enable_compilation_cache,
    sampling_params,
)
from mmx.errors import UserError
from mmx.obs import log
from mmx.sharding import distributed

EXAMPLE = """
mmx batch --model=nano --input=in.jsonl --output=out.jsonl --max_tokens=200
mmx batch --gin_file=configs/run/batch.gin --input=in.jsonl --output=out.jsonl
"""


@dataclasses.dataclass(frozen=True)
class BatchSettings(HostSettings, EngineSettings, SamplingSettings, ModelSettings):
    input: str | None = setting(None, "JSON Lines file of records.", group="Input", value="FILE")
    output: str | None = setting(
        None, "File of answers, in the order of the input. It appears when all are there; until "
        "then OUTPUT.partial-0 holds those that are, and one more file for each other process.",
        group="Output", value="FILE")
    restart: bool = setting(False, "Discard what an earlier run left, the output too.",
                            group="Output")
    json: bool = setting(False, "Tell the summary as one JSON object on stdout.", group="Output")
    slots: int = setting(8, "Records that are answered together.", group="Engine", low=1)
    host: int | None = setting(
        None, "This process, of --hosts that share a file system and nothing else; in place of "
        "--distributed.", group="Hosts", low=0)
    hosts: int | None = setting(None, "Processes that share the records; host 0 merges.",
                                group="Hosts", low=1)

    def __post_init__(self):
        super().__post_init__()
        if (self.host is None) != (self.hosts is None) or (
                self.host is not None and self.host >= self.hosts):
            raise UserError(f"host={self.host} of hosts={self.hosts} is no share.",
                            "Both are given, and host counts from 0.",
                            "Write for example --host=0 --hosts=4.")
        if self.host is not None and self.distributed == distributed.ON:
            raise UserError("--host and --distributed=on exclude each other.",
                            "Hosts that --host numbers share a file system and nothing else.",
                            "Leave one of them out.")


Settings = BatchSettings

# What the answers depend on besides the sampling; a resume with other values is refused.
_DETERMINING = ("model", "random_weights", "quantize", "kv_dtype")
# What they depend on by rounding at most; who runs out of memory lowers them and goes on.
_MAY_CHANGE = ("capacity", "prefill_chunk", "slots")


def run(call) -> int:
    """Answers the records of this host, and merges on host 0; 1 when every record failed."""
    settings = call.settings
    for name in ("input", "output"):
        if not getattr(settings, name):
            raise UserError(f"There is no --{name}.", "A batch reads one file and writes another.",
                            f"Add --{name}=FILE.jsonl.")
    if Path(settings.input).resolve() == Path(settings.output).resolve():
        raise UserError("--input and --output are the same file.",
                        "A batch reads one file and writes another.", "Name another --output.")
    enable_compilation_cache(settings.compilation_cache)
    mode = "off" if settings.host is not None else settings.distributed
    with joined(mode) as pod, interruptible(lambda: _interrupted(settings)):
        host, hosts = settings.host, settings.hosts
        if host is None:
            host, hosts = pod.index, pod.count
        else:
            log.set_process(host)
        check_output(settings.output)
        call.announce()
        together = pod.count > 1 and spans_processes(settings.mesh)
        if together and settings.host is not None:
            raise UserError("--host is for hosts that each hold the whole model.",
                            f"The mesh '{settings.mesh}' needs the devices of several.",
                            "Leave out --host, or make the mesh smaller.")
        from mmx.lm import default_dtype

        summary = run_batch(
            lambda: Answers(settings), Path(settings.input), Path(settings.output),
            sampling=sampling_params(settings), restart=settings.restart, host=host, hosts=hosts,
            barrier=pod.barrier if pod.count > 1 else None, together=together,
            settings={**{name: getattr(settings, name) for name in _DETERMINING},
                      "dtype": settings.dtype or default_dtype()},
            may_change={name: getattr(settings, name) for name in _MAY_CHANGE})
        if host == 0:
            call.save(settings.output + ".config.gin")
        _tell(settings, summary, pod.is_main, shared=hosts > 1 and not together)
    return int(summary.failed)


def _interrupted(settings: BatchSettings) -> str:
    done = len(journal.finished(Path(settings.output)))
    again = "without --restart " if settings.restart and done else ""
    return (f"Interrupted; {done:,} record{'s are' if done != 1 else ' is'} done. The same command "
            f"{again}goes on{' from there' if done else ''}.")


def _tell(settings: BatchSettings, summary, is_main: bool, shared: bool) -> None:
    from mmx.obs import memory

    if not is_main:
        return
    if settings.json:
        print(json.dumps({
            **dataclasses.asdict(summary), "tokens_per_s": round(summary.tokens_per_s, 2),
            "host_peak_bytes": memory.host_peak_bytes(), "output": settings.output}))
        return
    done = f"answered {summary.answered:,} of {summary.records:,} records"
    if shared:
        done = f"answered {summary.answered:,} by this host, of {summary.records:,} by all"
    if summary.resumed:
        done += f" ({summary.resumed:,} before)"
    parts = [done, f"{summary.errors:,} error{'s' * (summary.errors != 1)}"]
    if summary.answered:
        parts += [f"{summary.completion_tokens:,} tokens in {summary.seconds:.1f} s",
                  f"{summary.tokens_per_s:,.1f} tok/s", memory.summary()]
    log.note(" · ".join(parts))
    if summary.merged:
        log.note(f"wrote {settings.output}: {summary.records:,} records")


class Answers:
    """The loaded model as a batch asks of it (`mmx.batch.run.Answerer`)."""

    def __init__(self, settings: BatchSettings):
        from mmx.cli.session import Session

        self._session = Session(settings, slots=settings.slots)
        self.name = self._session.name
        self.run = self._session.run
        self.token_bytes = self._session.tokenizer.token_bytes

    def encode(self, job: records.Job) -> list[int]:
        from mmx.engine.request import Request

        if job.prompt_ids is not None:
            ids = list(job.prompt_ids)
        elif job.messages is not None:
            ids = self._session.chat_ids(job.messages, job.tools)
        else:
            ids = self._session.tokenizer.encode(job.prompt)
        self._session.engine.check(Request(job.index, ids, job.sampling))
        return ids

    def tool_calls(self, job: records.Job, text: str):
        return self._session.tool_calls(text) or None if job.tools else None
