"""Real GRPO training on the CPU, with Seer and without: verl's trainer, FSDP2 over gloo, two vLLM replicas.

With greedy decoding the two runs must sample the same responses: divided, drafted for each other, with KV blocks
shared between the replicas, over weights that change. The model has random weights in float32, so that no
two logits are equal, and one token in twelve is a stop token, so that responses end everywhere in a chunk.

With sampling, the reward of a small task rises. And an engine is killed in the middle of a rollout.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from verl_seer import live

pytest.importorskip("verl.workers.rollout.router", reason="needs verl, Ray and their dependencies")
psutil = pytest.importorskip("psutil")

STEPS, PROMPTS, GROUP = 2, 4, 4
CHUNK, LIMIT = 8, 48

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return (len(solution_str) % 7) / 7.0
"""
# The share of ASCII: about half of the tokens of a tokenizer of bytes.
ASCII_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(c.isascii() for c in solution_str) / max(1, len(solution_str))
"""
SEER = ("hydra.searchpath=[pkg://verl_seer.config]", "+seer=rollout", f"seer.chunk_size={CHUNK}")


def make_inputs(folder: Path, prompts: int = STEPS * PROMPTS, reward: str = REWARD) -> None:
    """A tokenizer, a random Qwen2 of 150 thousand parameters, prompts and a reward."""
    import pandas
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["what is 12 + 30 user assistant"] * 20,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, head_dim=32,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer), 12)]
    model.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"what is {i} + {7 * i}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(8 * i)},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(prompts)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "data.parquet")
    (folder / "reward.py").write_text(reward)


def overrides(folder: Path, out: Path, steps: int) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "algorithm.adv_estimator=grpo", "trainer.device=cpu", "trainer.logger=[console]",
        f"trainer.total_training_steps={steps}", "trainer.n_gpus_per_node=2", "trainer.nnodes=1",
        "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1",
        f"trainer.rollout_data_dir={out}", f"trainer.default_local_dir={out}/checkpoints",
        f"data.train_files={folder}/data.parquet", f"data.val_files={folder}/data.parquet", "data.shuffle=False",
        f"data.train_batch_size={PROMPTS}", "data.max_prompt_length=96", f"data.max_response_length={LIMIT}",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={folder}/model", "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"{actor}.strategy=fsdp2", f"{actor}.ppo_mini_batch_size={PROMPTS}", f"{actor}.use_torch_compile=False",
        f"{actor}.ppo_micro_batch_size_per_gpu=2", f"{actor}.use_kl_loss=False",
        f"{rollout}.name=vllm", f"{rollout}.n={GROUP}", f"{rollout}.top_k=1", f"{rollout}.dtype=float32",
        f"{rollout}.tensor_model_parallel_size=1", f"{rollout}.log_prob_micro_batch_size_per_gpu=4",
        f"{rollout}.enforce_eager=True", f"+{rollout}.enable_sleep_mode=False", f"{rollout}.free_cache_engine=False",
        f"{rollout}.max_model_len=144", f"{rollout}.max_num_seqs=8", f"{rollout}.max_num_batched_tokens=512",
        f"{rollout}.agent.num_workers=1", f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=16",
        "reward.num_workers=1", f"reward.custom_reward_function.path={folder}/reward.py",
        "reward.custom_reward_function.name=compute_score",
        # Logical resources: verl reserves eight processors for its queue and waits for them without an end.
        "+ray_kwargs.ray_init.num_gpus=2", "ray_kwargs.ray_init.num_cpus=16",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "+ray_kwargs.ray_init.include_dashboard=False", "+ray_kwargs.ray_init.object_store_memory=300000000",
    ]  # fmt: skip


def train(
    folder: Path,
    name: str,
    *more: str,
    steps: int = STEPS,
) -> tuple[list[list[dict[str, Any]]], str]:
    """The samples of each step, and the run's output."""
    with running(folder, name, *more, steps=steps) as run:
        code = run.wait(timeout=1500)
    text = (folder / f"{name}.log").read_text(errors="replace")
    assert code == 0, text[-6000:]
    samples = []
    for step in range(1, steps + 1):
        rows = (folder / name / f"{step}.jsonl").read_text().splitlines()
        samples.append([json.loads(line) for line in rows])
    return samples, text


@contextmanager
def running(folder: Path, name: str, *more: str, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A training run, which ends with the block."""
    out = folder / name
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "RAY_DEDUP_LOGS": "0",
        "RAY_AUTH_MODE": "disabled", "RAY_prestart_worker_first_driver": "0",
        live.FOLDER: str(folder / f"{name}-status"),
    }  # fmt: skip
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(folder, out, steps), *more]
    with (folder / f"{name}.log").open("w") as file:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield run
        finally:
            if run.poll() is None:
                for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            run.wait()


def texts(samples: list[list[dict[str, Any]]]) -> list[list[tuple[str, str]]]:
    """Sorted (prompt, response) of each step."""
    return [sorted((row["input"], row["output"]) for row in step) for step in samples]


@pytest.mark.slow
def test_seer_samples_what_stock_verl_samples(tmp_path):
    make_inputs(tmp_path)
    stock = texts(train(tmp_path, "stock")[0])
    samples, log = train(
        tmp_path,
        "seer",
        *SEER,
        "seer.draft_update_seconds=0.001",
        "seer.draft_min_score=0",
        f"seer.kv_pool={tmp_path}/kv",
        "seer.affinity_spread=0",  # chunks move as soon as the other server runs less
        "actor_rollout_ref.rollout.scheduling_policy=priority",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=32",
    )
    seer = texts(samples)
    for step in stock:
        assert set(collections.Counter(prompt for prompt, _ in step).values()) == {GROUP}
        assert len(step) == PROMPTS * GROUP
    assert seer == stock
    assert len({len(text) for step in stock for _, text in step}) > 1, "responses must differ in length"
    counts = [
        [int(n) for n in row]
        for row in re.findall(
            r"Seer: (\d+) requests, (\d+) chunks, (\d+) moved, (\d+) lost, (\d+) tokens", log
        )
    ]
    assert len(counts) == STEPS
    for requests, chunks, _, lost, tokens in counts:
        assert requests == PROMPTS * GROUP and lost == 0
        assert tokens / CHUNK <= chunks <= tokens / CHUNK + requests
        assert chunks > requests, "responses must be longer than a chunk"
    # Said at the start of each rollout, of all before it: siblings say the same, so that drafts are right.
    said = re.findall(
        r"Seer drafts: (\d+) of (\d+) tokens accepted in \d+ drafts, (\d+) tokens from other", log
    )
    assert len(said) == STEPS
    accepted, drafted, _ = (int(n) for n in said[-1])
    assert 0 < accepted <= drafted
    assert not list((tmp_path / "kv").iterdir()), "the last weights emptied the pool"


@pytest.mark.slow
def test_the_reward_of_a_small_task_rises(tmp_path):
    """Eight steps of 64 samples with all of Seer but the pool. Without learning the means of the first and the last two
    steps differ by chance: a sample's share has a standard deviation below 0.5, so that of the difference is below
    0.5 * sqrt(2 / 128) = 0.063 if samples are independent, and a rise of 0.2 is three of them."""
    steps, prompts, group = 8, 8, 8
    make_inputs(tmp_path, steps * prompts, ASCII_REWARD)
    samples, _ = train(
        tmp_path,
        "reward",
        *SEER,
        f"data.train_batch_size={prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"actor_rollout_ref.rollout.n={group}",
        "actor_rollout_ref.rollout.top_k=-1",
        "actor_rollout_ref.actor.optim.lr=5e-3",
        steps=steps,
    )
    means = [sum(row["score"] for row in step) / len(step) for step in samples]
    assert [len(step) for step in samples] == [prompts * group] * steps
    print("mean rewards:", [round(m, 3) for m in means])
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.2, means


@pytest.mark.slow
def test_training_goes_on_though_an_engine_is_killed(tmp_path):
    """In the first rollout of two: every sample is whole, the engine gets the new weights and takes part again."""
    length = 320
    make_inputs(tmp_path)
    options = [
        *SEER,
        "actor_rollout_ref.rollout.ignore_eos=True",
        f"data.max_response_length={length}",
        f"actor_rollout_ref.rollout.max_model_len={96 + length}",
    ]
    killed, fewer, again = False, False, False
    with running(tmp_path, "killed", *options, steps=2) as run:
        deadline = time.monotonic() + 1200
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            try:
                seen = live.read(tmp_path / "killed-status")
            except ValueError:  # it has not begun, or ends
                continue
            servers = seen["instances"]
            if killed:
                fewer |= len(servers) == 1
                again |= fewer and len(servers) == 2 and all(x["running"] for x in servers)
            elif seen["counts"]["chunks"] > PROMPTS * GROUP and all(x["running"] for x in servers):
                children = psutil.Process(run.pid).children(recursive=True)
                engines = [p for p in children if "EngineCore" in p.name()]
                assert len(engines) == 2, children
                engines[0].kill()
                killed = True
        code = run.poll()
    text = (tmp_path / "killed.log").read_text(errors="replace")
    assert killed and code == 0, text[-6000:]
    assert "is lost, its chunks run elsewhere" in text
    assert fewer and again, "the engine was started again, and ran chunks after that"
    rollouts = re.findall(r"Seer: (\d+) requests, (\d+) chunks, (\d+) moved, (\d+) lost, (\d+) tokens", text)
    assert len(rollouts) == 2, text[-6000:]
    for step, found in enumerate(rollouts, 1):
        requests, chunks, _, lost, tokens = (int(n) for n in found)
        assert requests == PROMPTS * GROUP and tokens == requests * length and chunks >= tokens // CHUNK
        assert (lost > 0) == (step == 1)
        rows = [json.loads(x) for x in (tmp_path / "killed" / f"{step}.jsonl").read_text().splitlines()]
        assert set(collections.Counter(row["input"] for row in rows).values()) == {GROUP}
        assert len(rows) == PROMPTS * GROUP
