"""Text in and out: tokenizers, chat prompts, function calls, stop strings."""

from mmx.text.chat import protocol_of, render, render_ids
from mmx.text.detok import IncrementalDecoder
from mmx.text.functions import CallSplitter, FunctionCall, Reply, parse_calls, parse_reply
from mmx.text.stop import StopMatcher
from mmx.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["CallSplitter", "FunctionCall", "IncrementalDecoder", "Reply", "StopMatcher",
           "Tokenizer", "load_tokenizer", "parse_calls", "parse_reply", "protocol_of", "render",
           "render_ids"]
