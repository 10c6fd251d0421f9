"""`kimi-stack models`: look at checkpoints, make tiny ones, train tiny ones, fetch published ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Kimi Linear checkpoints: look at one, make or train a tiny one, fetch a published one.",
    no_args_is_help=True,
)


def _fail(message: object) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _number(count: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


@app.command()
def inspect(
    path_or_name: Annotated[
        str, typer.Argument(help="A model folder, or a name such as moonshotai/Kimi-Linear.")
    ],
    layers: Annotated[bool, typer.Option(help="Print the table of layers.")] = True,
) -> None:
    """Parameters, active parameters, and cache bytes per token and per sequence, from the config alone.

    Example: kimi-stack models inspect moonshotai/Kimi-Linear
    """
    from kimi_models.hub import find_config
    from kimi_models.stats import model_cost
    from kimi_models.validate import ConfigError

    try:
        config = find_config(path_or_name)
    except ConfigError as e:
        _fail(e)
    cost, la = model_cost(config), config.linear_attn_config
    console = Console()
    facts = Table(title=path_or_name, show_header=False, title_justify="left")
    facts.add_row("parameters", f"{_number(cost.parameters)} ({cost.parameters:,})")
    facts.add_row("active per token", f"{_number(cost.active)} ({cost.active:,})")
    facts.add_row("of them embeddings and head", _number(cost.embedding))
    facts.add_row("layers", f"{len(la.kda_layers)} KDA, {len(la.full_attn_layers)} MLA")
    facts.add_row("attention residuals", _attn_res_words(config.attn_res_full, config.attn_res_block_size))
    bound = la.gate_lower_bound
    facts.add_row("decay gate", "softplus" if bound is None else f"lower-bounded at {bound:g}")
    facts.add_row("context", f"{config.model_max_length:,} tokens")
    facts.add_row("KV cache per token", f"{_size(cost.cache_bytes_per_token)} ({config.dtype})")
    facts.add_row(
        "the same if all MLA", f"{_size(cost.all_mla_bytes_per_token)} ({cost.cache_saving:.0%} saved)"
    )
    facts.add_row(
        "KDA state per sequence",
        f"{_size(cost.state_bytes_per_sequence)} (recurrent float32 {_size(cost.recurrent_bytes_per_sequence)}, "
        f"convolution {config.dtype} {_size(cost.conv_bytes_per_sequence)})",
    )
    console.print(facts)
    if layers:
        table = Table("layer", "attention", "experts")
        for heading in ("total", "active", "cache/token", "state/seq"):
            table.add_column(heading, justify="right", no_wrap=True)
        for x in cost.layers:
            table.add_row(
                str(x.number),
                x.attention,
                x.mlp,
                _number(x.parameters),
                _number(x.active),
                _size(x.cache_bytes_per_token) if x.cache_bytes_per_token else "-",
                _size(x.state_bytes_per_sequence) if x.state_bytes_per_sequence else "-",
            )
        console.print(table)


def _attn_res_words(full: bool, block: int | None) -> str:
    if full:
        return "full (every sub-layer)"
    return "none" if block is None else f"blocks of {block} decoder layer{'s' if block > 1 else ''}"


@app.command()
def tiny(
    out: Annotated[Path, typer.Argument(help="Folder to write. Files of the same names are replaced.")],
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers; every fourth is MLA.")] = 4,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Heads of KDA and of MLA.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a KDA head, a multiple of 16.")] = 32,
    experts: Annotated[int, typer.Option(min=1, help="Routed experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token is routed to.")] = 2,
    attn_res: Annotated[
        str, typer.Option(help="Attention Residuals: none, full, or a block size in decoder layers.")
    ] = "none",
    gate_lower_bound: Annotated[
        float | None, typer.Option(help="Use the lower-bounded decay gate with this bound, in [-5, 0).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the stored weights.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a small checkpoint with random weights and a byte tokenizer, for tests and benchmarks.

    Example: kimi-stack models tiny /tmp/tiny --attn-res 2
    """
    from kimi_models.tiny import tiny_config, write_tiny
    from kimi_models.validate import ConfigError

    try:
        config = tiny_config(
            layers,
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_heads=heads,
            head_dim=head_dim,
            num_experts=experts,
            num_experts_per_token=top_k,
            gate_lower_bound=gate_lower_bound,
            dtype=dtype,
            attn_res_full=attn_res == "full",
            attn_res_block_size=_block_size(attn_res),
        )
    except ConfigError as e:
        _fail(e)
    path = write_tiny(out, config, seed)
    total = sum(f.stat().st_size for f in path.iterdir())
    Console().print(f"wrote {path} ({_size(total)}); look at it with: kimi-stack models inspect {path}")


def _block_size(attn_res: str) -> int | None:
    if attn_res in ("none", "full"):
        return None
    if not attn_res.isdecimal() or int(attn_res) < 1:
        _fail(f"--attn-res must be none, full or a block size of 1 or more, got {attn_res!r}")
    return int(attn_res)


@app.command("train-tiny")
def train_tiny(
    out: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
    attn_res: Annotated[
        int,
        typer.Option(
            min=0, help="Block Attention Residuals with this block size in decoder layers; 0 is none."
        ),
    ] = 0,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to train on; the text has about 3 million.")
    ] = 5_000_000,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers; every fourth is MLA.")] = 4,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 192,
    experts: Annotated[int, typer.Option(min=2, help="Routed experts of a layer, two to a token.")] = 8,
    expert_size: Annotated[int, typer.Option(min=1, help="Width of one expert.")] = 96,
    vocab_size: Annotated[int, typer.Option(min=259, help="Tokens of the byte-level BPE tokenizer.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 1024,
    lr: Annotated[
        float, typer.Option(min=0, help="Peak learning rate of Muon; AdamW's is relative to it.")
    ] = 1e-2,
    vector_scale: Annotated[
        float,
        typer.Option(min=0, help="Learning rate of norms, gates and AttnRes queries, relative to --lr."),
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the text.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; results differ slightly between numbers.")
    ] = 1,
) -> None:
    """Train a tiny Kimi Linear on the standard library's sources and language reference.

    Some modules are held out whole; at the end the bits per byte on them are compared with a Kneser-Ney 5-gram.
    Writes config, tokenizer, weights, training.json (what made it, and the figures) and loss.png.

    Example: kimi-stack models train-tiny /tmp/mine --tokens 500000
    """
    import torch

    from kimi_models.training.plot import plot_losses, require_matplotlib
    from kimi_models.training.train import Recipe, train
    from kimi_models.validate import ConfigError

    recipe = Recipe(
        seed=seed, tokens=tokens, batch=batch, length=length, lr=lr, vocab_size=vocab_size, layers=layers,
        hidden_size=hidden_size, experts=experts, expert_size=expert_size, attn_res=attn_res, vector_scale=vector_scale,
    )  # fmt: skip
    torch.set_num_threads(threads)
    command = " ".join(["kimi-stack", *sys.argv[1:]])
    try:
        require_matplotlib()
        report = train(recipe, out, command)
        plot_losses(report, out / "loss.png")
    except (ConfigError, FloatingPointError, FileNotFoundError, ImportError) as e:
        _fail(e)


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help="owner/name on the Hugging Face hub, or moonshotai/Kimi-Linear.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to put it in; default: the hub's cache.")] = None,
    with_code: Annotated[
        bool, typer.Option(help="Also take *.py files (the published tokenizer needs its own).")
    ] = False,
) -> None:
    """Download a checkpoint: safetensors and text files, no pickles.

    Example: kimi-stack models fetch moonshotai/Kimi-Linear --with-code
    """
    from kimi_models.hub import FetchError, resolve_name
    from kimi_models.hub import fetch as fetch_from_hub

    try:
        folder = fetch_from_hub(name, revision, out, with_code)
    except FetchError as e:
        _fail(e)
    Console().print(f"{resolve_name(name)} is in {folder}", soft_wrap=True)
