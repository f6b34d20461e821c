"""`lq eval` and `lq generate`: what a model is good for, quantized or not."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lq.cli.options import WINDOW, AnyModel, Data
from lq.cli.printing import cell, print_table
from lq.errors import UserError


def eval_(
    model: AnyModel,
    data: Data = "standin",
    window: Annotated[int | None, typer.Option(min=2, help=f"Tokens; {WINDOW}.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="The window when not given: no overlap.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="The first so many; all when not given.")] = None,
    original: Annotated[str | None, typer.Option(help="The model it was made of, for KL and top-1 agreement.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16, float16.")] = "float32",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Perplexity, and with --original KL divergence and top-1 agreement."""
    from lq.runs.single import evaluate_one

    if json_ is not None and json_.is_dir():
        raise UserError(f"--json {json_}: a directory; give a file")
    facts = evaluate_one(model, data, window, stride, windows, original, batch_size, dtype)
    print_table(["", ""], [[key, cell(value)] for key, value in facts.items()])
    if json_:
        import json

        from lq.atomic import write_text

        write_text(json_, json.dumps(facts, indent=1) + "\n")


def generate(
    context: typer.Context,
    model: AnyModel,
    prompt: Annotated[list[str], typer.Option(help="Repeat for a batch.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: int = 0,
    kv_bits: Annotated[int, typer.Option(help="Key/value cache: 4 or 8, quantized (KIVI); 16, as computed.")] = 16,
) -> None:
    """Continues a prompt."""
    from lq.api import load, prepare
    from lq.cli import arguments
    from lq.models.generate import cache_nbytes, decode_continuation, kv_cache_spec
    from lq.models.generate import generate as continue_prompts

    cache = kv_cache_spec(kv_bits)  # refused before any work
    if temperature == 0.0:
        arguments.refuse(context, arguments.SAMPLING, "at temperature 0 nothing is drawn")
    decoder, params, tokenizer = load(model)
    params = prepare(params)
    prompts = [tokenizer(text)["input_ids"] for text in prompt]
    continuations = continue_prompts(
        decoder,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        kv_bits=kv_bits,
    )
    if cache is not None:
        sizes = [
            cache_nbytes(decoder, params, prompts, max_new_tokens=max_new_tokens, kv_bits=b) for b in (kv_bits, 16)
        ]
        print(f"key/value cache: {sizes[0]} bytes at {kv_bits} bits; {sizes[1]} as computed", file=sys.stderr)
        if max(map(len, prompts)) + max_new_tokens <= cache.residual:
            note = f"nothing was quantized: the newest {cache.residual} tokens stay as computed, and there were no more"
            print(note, file=sys.stderr)
    for text, ids, new in zip(prompt, prompts, continuations, strict=True):
        print(text + decode_continuation(tokenizer, ids, new))
