"""Write text after a prompt, or chat: tokens stream to stdout as they come, figures to stderr."""

import dataclasses

from mmx.cli.settings import setting
from mmx.cli.shared import ModelSettings, SamplingSettings

EXAMPLE = """
mmx generate --model=nano --prompt="Once upon a time" --max_tokens=100
mmx generate --prompt_file=notes.txt --temperature=0.7 --top_p=0.95 --json
mmx generate --model=DIR --chat --system="Answer briefly."
"""


@dataclasses.dataclass(frozen=True)
class GenerateSettings(SamplingSettings, ModelSettings):
    prompt: str | None = setting(None, "The text to continue.", group="Input")
    temperature: float = setting(0.0, "x")


Settings = GenerateSettings
