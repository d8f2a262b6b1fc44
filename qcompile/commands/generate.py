"""`qcompile generate DIR --prompt TEXT`: stream a completion, from one process or from all that torchrun started."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qcompile.commands.arguments import SEED, add_shared, filled, utf8, whole
from qcompile.errors import ConfigError

if TYPE_CHECKING:
    from qcompile.parallel.ranks import Ranks


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("generate", help="complete a prompt with a quantized folder, token by token")
    parser.add_argument("model", metavar="DIR", help="quantized model folder")
    parser.add_argument(
        "--prompt", required=True, type=utf8, metavar="TEXT", help='what to complete; "-" reads standard input'
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, metavar="N", help="at most (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    parser.add_argument("--stop", nargs="*", type=filled, default=[], metavar="TEXT", help="strings to stop after")
    parser.add_argument("--seed", type=whole(*SEED), default=0)
    parser.add_argument(
        "--max-length", type=whole(2), metavar="N", help="tokens of prompt and answer that are compiled for"
    )
    add_shared(parser, "--inner", "--device", "--trust-remote-code")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, compile what this prompt needs, print tokens as they come."""
    from qcompile.parallel.ranks import joined

    with joined() as ranks:
        _run(arguments, ranks)


def _run(arguments: argparse.Namespace, ranks: "Ranks") -> None:
    import torch
    from transformers import GenerationConfig, TextStreamer

    from qcompile.generation.pipeline import load_generation
    from qcompile.model_limits import ends_of

    settings = _sampling(arguments)
    text = ranks.same(_standard_input) if arguments.prompt == "-" else arguments.prompt
    model, tokenizer = _loaded(arguments, ranks)
    model, tokenizer = load_generation(model, tokenizer, max_length=arguments.max_length, inner=arguments.inner)
    encoded = _encoded(tokenizer, text, chat=arguments.chat).to(model.device)
    if not encoded["input_ids"].numel():
        raise ConfigError("prompt must hold at least one token; it is empty")
    # Of the model's own settings only those tokens remain; its beams and penalties would answer otherwise than asked.
    model.generation_config = GenerationConfig(
        **settings, eos_token_id=sorted(ends_of(model, tokenizer)) or None, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(arguments.seed)
    if ranks.first:
        print("qcompile: compiling …", file=sys.stderr, flush=True)
    model.generate(
        **encoded, max_new_tokens=arguments.max_new_tokens, stop_strings=arguments.stop or None, tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if ranks.first else None,
    )  # fmt: skip


def _standard_input() -> str:
    try:
        return utf8(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input must be text in UTF-8; {error}") from None
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"standard input {error}") from None


def _loaded(arguments: argparse.Namespace, ranks: "Ranks") -> tuple[Any, Any]:
    """This process's share of the model, and the tokenizer."""
    from qcompile.checkpoint.loading import from_pretrained, load_tokenizer
    from qcompile.commands.device import device_of
    from qcompile.parallel.tensor_parallel import shard

    device = ranks.device(device_of(arguments.device))
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    # A GPU may have room for a share only.
    first = device if ranks.size == 1 else "cpu"
    model = from_pretrained(arguments.model, device=first, trust_remote_code=arguments.trust_remote_code)
    if ranks.size > 1:
        shard(model, ranks.rank, ranks.size, ranks.group)
    return model.to(device), tokenizer


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    from qcompile.serving.sampling import is_greedy

    if not 0 <= arguments.temperature <= 100:
        raise ConfigError(f"temperature must be 0…100; got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"top-p must be above 0 and at most 1; got {arguments.top_p}")
    if is_greedy(arguments.temperature):
        if arguments.top_p < 1:
            raise ConfigError(f"top-p goes with a temperature; got {arguments.top_p} and none; pass --temperature")
        return {"do_sample": False}
    return {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}


def _encoded(tokenizer: Any, text: str, *, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat needs a model with a chat template; this one has none; leave out --chat")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
    )
