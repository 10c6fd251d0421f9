"""Newton-Schulz on Triton kernels: interpreted on the CPU, or on a GPU where there is one.

Limits in the L2 norm against the polynomials on the singular values in float64: float32 as on the CPU, where the
interpreter's products are float32 (a GPU splits them); bfloat16 the tens of roundings that its steps amplify.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kimi_kernels import BackendError, _triton, newton_schulz
from kimi_kernels.muon import COEFFICIENTS, schulz_triples
from kimi_kernels.muon import triton as backend

pytest.importorskip("triton")
import triton
import triton.language as tl

from kimi_kernels.muon import triton_kernels
from kimi_kernels.muon.triton_kernels import pair_of_tiles

DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)

ERROR = {torch.float32: 5e-6 if _triton.interpreting() else 1e-4, torch.bfloat16: 5e-2}
DTYPES = list(ERROR)
SHAPES = [(64, 64), (3, 96, 192), (2, 2, 192, 96), (1, 300), (5, 1), (4, 33, 17), (2, 16, 200), (257, 130)]


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


@pytest.fixture
def large(monkeypatch):
    """large(rows): matrices of that many rows and more take the tiles and the library's products of large ones."""

    def set_to(rows):
        monkeypatch.setattr(triton_kernels, "LARGE", rows)
        monkeypatch.setattr(backend, "_LIBRARY_ROWS", rows)

    return set_to


def schulz(x: Tensor, *args, **options) -> Tensor:
    return newton_schulz(x.to(DEVICE), *args, **options).cpu()


def exact(x: Tensor, steps: int = 5, coefficients="moonlight", eps: float = 1e-7) -> Tensor:
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + eps)
    for a, b, c in schulz_triples(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return u @ (s[..., None] * vt)


def error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def with_spectrum(rows: int, columns: int, decay: float) -> Tensor:
    """Singular values from 1 down to 10^-decay."""
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
    return ((u * torch.logspace(0, -decay, rows, dtype=torch.float64)) @ v.mT).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    x = torch.randn(shape)
    y = schulz(x, dtype=dtype)
    assert y.dtype == torch.float32 and y.shape == x.shape and y.is_contiguous()
    assert error(y, exact(x)) < ERROR[dtype]


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_tables_and_steps(coefficients):
    x = with_spectrum(40, 70, 1)
    for steps in (1, 3, 5):
        found = schulz(x, steps, coefficients)
        # The slopes of five polynomials at 0 grow a rounding a thousandfold; see the float64 test of the CPU.
        assert error(found, exact(x, steps, coefficients)) < 4 * ERROR[torch.float32]


@pytest.mark.parametrize("triple", [(1.5, -0.5, 0.0), (1.2, 0.0, -0.1), (0.0, 0.7, 0.2), (2.0, 0.0, 0.0)])
@pytest.mark.parametrize("columns", [30, 400])
def test_zeros_among_the_coefficients(triple, columns):
    x = torch.randn(20, columns)
    for dtype in DTYPES:
        assert error(schulz(x, 3, [triple], dtype=dtype), exact(x, 3, [triple])) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_dtypes_of_input_and_products(dtype, kind):
    x = torch.randn(2, 70, 50).to(kind)
    y = schulz(x, dtype=dtype)
    assert y.dtype == kind
    assert error(y, exact(x)) < max(ERROR[dtype], ERROR[kind])


@pytest.mark.parametrize(
    "dtype, into", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("rows, inner", [(1, 1), (64, 64), (65, 31), (200, 77), (390, 129), (128, 256)])
def test_symmetric_product(rows, inner, dtype, into, large):
    large(300)  # 390 rows in tiles of 128, the others of 64
    x, base = torch.randn(2, rows, inner).to(dtype), torch.randn(2, rows, rows).to(dtype)
    base = base + base.mT
    found = backend.symmetric_product(
        x.to(DEVICE), x.to(DEVICE), base=base.to(DEVICE), alpha=0.7, beta=-0.3, diagonal=2.5, dtype=into
    ).cpu()
    x, base, one = x.double(), base.double(), torch.eye(rows, dtype=torch.float64)
    wanted = 0.7 * x @ x.mT - 0.3 * base + 2.5 * one
    assert found.dtype == (into or dtype)
    assert error(found, wanted) < (3e-3 if found.dtype == torch.bfloat16 else ERROR[torch.float32])
    tile = torch.arange(rows) // (128 if rows >= 300 and dtype == torch.bfloat16 else 64)
    other = tile[:, None] != tile
    assert torch.equal(found[:, other], found.mT[:, other])


def test_symmetric_product_of_two_matrices_that_commute():
    x = torch.randn(1, 150, 150)
    x = x @ x.mT / 150
    y = 0.5 * x @ x + x
    found = backend.symmetric_product(x.to(DEVICE), y.to(DEVICE)).cpu()
    assert error(found, x.double() @ y.double()) < ERROR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, inner, columns", [(1, 1, 1), (64, 64, 128), (65, 31, 70), (200, 77, 129), (390, 64, 90)]
)
def test_product(rows, inner, columns, dtype, large):
    large(300)
    left, right, base = torch.randn(2, rows, inner), torch.randn(2, inner, columns), torch.randn(2, rows, columns)
    left, right, base = (x.to(dtype) for x in (left, right, base))
    found = backend._product(left.to(DEVICE), right.to(DEVICE), base.to(DEVICE), beta=1.5).cpu()
    wanted = left.double() @ right.double() + 1.5 * base.double()
    assert error(found, wanted) < (3e-3 if dtype == torch.bfloat16 else ERROR[torch.float32])


@triton.jit
def _pairs_kernel(found, tiles, count, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = pair_of_tiles(p, tiles, GROUP)
    tl.store(found + 2 * p, i, mask=p < count)
    tl.store(found + 2 * p + 1, j, mask=p < count)


def test_order_of_tiles_has_every_pair_once():
    for tiles in (1, 2, 7, 8, 9, 16, 33, 300):
        count = tiles * (tiles + 1) // 2
        found = torch.empty(count, 2, dtype=torch.int32, device=DEVICE)
        _pairs_kernel[(-(-count // 4096),)](found, tiles, count, BLOCK=4096, GROUP=8)
        wanted = torch.triu_indices(tiles, tiles).T
        order = found.cpu()[(found.cpu() @ torch.tensor([tiles, 1], dtype=torch.int32)).argsort()]
        assert torch.equal(order.long(), wanted)
        # Neighbours in the order share what they read: never more than a group of columns and two rows.
        window = found.cpu()[: 8 * (count // 8)].view(-1, 8, 2)
        assert (window[..., 1].amax(1) - window[..., 1].amin(1) < 16).all()


@pytest.mark.parametrize("decay", [1, 3, 6])
@pytest.mark.parametrize("columns", [96, 700])
def test_as_accurate_as_the_formula_on_hard_spectra(decay, columns, monkeypatch):
    """700 columns take the Gram form."""
    x = with_spectrum(64, columns, decay)
    assert backend.gram_form_pays(64, columns, 5) == (columns == 700)
    fast = error(schulz(x, dtype=torch.bfloat16), exact(x))
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    assert fast <= 1.1 * error(newton_schulz(x, dtype=torch.bfloat16), exact(x))


def test_gram_form_needs_its_float32(monkeypatch):
    """The same iteration in bfloat16 diverges on a spectrum that it takes in float32."""
    x = with_spectrum(64, 700, 3)
    assert error(schulz(x, dtype=torch.bfloat16), exact(x)) < 0.1
    symmetric = backend.symmetric_product
    narrow = lambda *args, **options: symmetric(*args, **options).bfloat16().float()
    monkeypatch.setattr(backend, "symmetric_product", narrow)
    assert not error(schulz(x, dtype=torch.bfloat16), exact(x)) < 1


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("rows, columns", [(16, 48), (16, 400)])
def test_multiplications_are_those_that_the_choice_counts(rows, columns, steps, monkeypatch):
    """What each form launches, with half of a symmetric product, and float32 ones at their cost; units of rows^2."""
    spent = []

    def counted(product, of_symmetric):
        def run(left, right, *args, **options):
            out = product(left, right, *args, **options)
            cost = backend._FLOAT32_COST if left.dtype == torch.float32 else 1
            spent.append(cost * of_symmetric * left.shape[2] * out.shape[2] / rows)
            return out

        return run

    monkeypatch.setattr(backend, "symmetric_product", counted(backend.symmetric_product, 0.5))
    monkeypatch.setattr(backend, "_product", counted(backend._product, 1.0))
    u = backend._unit(torch.randn(1, rows, columns, device=DEVICE), 1e-7, torch.bfloat16)
    triples = list(schulz_triples("moonlight", steps))
    backend._on_matrix(u, triples)
    on_matrix = sum(spent)
    spent.clear()
    backend._on_gram(u, triples)
    assert backend.gram_form_pays(rows, columns, steps) == (sum(spent) < on_matrix)
    assert on_matrix == steps * (1.5 * columns + 0.5 * rows)
    assert sum(spent) == 2.5 * columns + backend._FLOAT32_COST * (2 * steps - 1.5) * rows


def test_gram_form_pays_from_ten_columns_a_row_and_never_for_one_step(monkeypatch):
    monkeypatch.setattr(backend, "_FLOAT32_COST", 6)
    pays = [m for m in range(1, 400) if backend.gram_form_pays(10, m, 5)]
    assert pays == list(range(98, 400))
    assert not backend.gram_form_pays(1, 10**6, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 66, 90), (2, 70, 40), (2, 24, 300), (2, 104, 136)])
def test_a_matrix_has_the_same_bits_alone_and_in_a_batch(shape, dtype, large):
    large(100)  # the last shape takes the library's products
    steps = 2 if shape[2] == 300 else 1  # the Gram form never pays for one
    x = torch.randn(shape)
    batch = schulz(x, steps, dtype=dtype)
    assert torch.equal(schulz(x, steps, dtype=dtype), batch)
    for matrix, wanted in zip(x, batch):
        assert torch.equal(schulz(matrix, steps, dtype=dtype), wanted)


@pytest.mark.parametrize("shape", [(2, 136, 256), (1, 140, 131), (270, 150)])
def test_large_matrices(shape, large):
    """Tiles of 128 with the library's products, and without where rows are not aligned for it."""
    large(128)
    x = torch.randn(shape)
    assert error(schulz(x, 2, dtype=torch.bfloat16), exact(x, 2)) < ERROR[torch.bfloat16]


def test_library_products_only_where_every_matrix_of_a_batch_is_aligned(large, monkeypatch):
    large(64)
    used = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: used.append(1) or addmm(*args, **options))
    for shape, calls in [((3, 64, 72), 3), ((3, 65, 71), 0), ((3, 56, 72), 0)]:
        schulz(torch.randn(shape), 1, dtype=torch.bfloat16)
        assert len(used) == calls
        used.clear()


@pytest.mark.slow
def test_a_matrix_of_1024_rows():
    """As many as take the tiles of large matrices by themselves."""
    x, (a, b, c) = torch.randn(triton_kernels.LARGE, 1056), COEFFICIENTS["moonlight"][0]
    found = schulz(x, 1, dtype=torch.bfloat16)
    u = x.double() / x.double().norm()
    gram = u @ u.mT
    assert error(found, a * u + (b * gram + c * gram @ gram) @ u) < ERROR[torch.bfloat16]


def test_strided_and_transposed_inputs():
    x = torch.randn(2, 90, 70)
    wanted = schulz(x, 1)
    room = torch.full((2, 95, 3, 80), float("nan"))
    room[:, 2:92, 1, 5:75] = x
    assert torch.equal(schulz(room[:, 2:92, 1, 5:75], 1), wanted)
    assert torch.equal(schulz(x.mT.contiguous().mT, 1), wanted)
    assert torch.equal(schulz(x.mT, 1), wanted.mT)
    assert torch.equal(schulz(x.transpose(0, 1).contiguous().transpose(0, 1), 1), wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="the storage is reserved memory that a GPU would have to have")
def test_offsets_beyond_32_bits():
    x = torch.randn(4, 16)
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * 2**30 + 64)))
    far = room.as_strided((4, 16), (2**30, 1))
    far.copy_(x)
    assert torch.equal(schulz(far), schulz(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 200])
def test_zeros_and_nans(dtype, columns):
    x = torch.randn(4, 6, columns)
    x[1] = 0
    x[2, 3, 4] = float("nan")
    y = schulz(x, dtype=dtype)
    assert torch.equal(y[1], torch.zeros(6, columns))
    assert y[2].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_empty_batches_and_matrices():
    for shape in [(0, 4, 6), (3, 0, 6), (3, 6, 0)]:
        assert schulz(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("factor", [1e15, 1e30])
def test_large_values_do_not_overflow(factor):
    x = torch.randn(70, 90)
    assert error(schulz(factor * x, 2), exact(x, 2)) < ERROR[torch.float32]


def test_eps_is_added_to_the_norm():
    x = torch.randn(20, 30)
    assert error(schulz(1e-3 * x, eps=0.5), exact(1e-3 * x, eps=0.5)) < ERROR[torch.float32]


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64), (16, 300)])
def test_as_near_to_float64_as_torch_muon(shape):
    """The iteration of torch.optim.Muon on the same bfloat16 input, in bfloat16 products."""
    from torch.optim._muon import _zeropower_via_newtonschulz as zeropower

    x = torch.randn(shape).bfloat16()
    theirs = zeropower(x, COEFFICIENTS["moonlight"][0], 5, 1e-7)
    ours = schulz(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert error(ours, exact(x)) <= 1.05 * error(theirs, exact(x))


def test_values_are_never_read_on_the_host():
    """Nothing waits for the device, so that a CUDA graph can hold the op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    flat = list(itertools.chain(*schulz_triples("moonlight", 2)))
    for columns in (20, 300):
        with Record():
            backend.newton_schulz(torch.randn(2, 10, columns, device=DEVICE), flat, 1e-7, torch.bfloat16)
    assert torch.ops.aten.cat in called
    assert not called & {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, dtype", [((3, 8, 12), torch.float32), ((12, 8), torch.bfloat16), ((4, 60), torch.bfloat16)]
)
def test_opcheck(shape, dtype):
    flat = list(itertools.chain(*schulz_triples("you", 5)))
    x = torch.randn(shape, device=DEVICE)
    torch.library.opcheck(torch.ops.kimi.newton_schulz.default, (x, flat, 1e-7, dtype))


@pytest.mark.slow
def test_compiles_as_one_graph():
    x = torch.randn(8, 12, device=DEVICE)
    compiled = torch.compile(lambda t: newton_schulz(t).sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), newton_schulz(x).sin())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"x": torch.randn(4)}, r"x must be \[..., n, m\], got shape \(4,\)"),
        ({"x": torch.zeros(4, 4, dtype=torch.int64)}, "x must be bfloat16, float32 or float64, got torch.int64"),
        ({"dtype": torch.float16}, "dtype must be bfloat16, float32 or float64, got torch.float16"),
        ({"steps": 6, "coefficients": "you"}, "steps must be at most 5"),
        ({"eps": -1.0}, "eps must not be negative"),
    ],
)
def test_bad_input_never_reaches_a_kernel(monkeypatch, wrong, message):
    monkeypatch.setattr(_triton, "launch", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ValueError, match=message):
        schulz(**{"x": torch.randn(4, 4), **wrong})


def test_what_it_cannot_run_is_said():
    x = torch.randn(4, 4)
    with pytest.raises(BackendError, match="cannot run newton_schulz: computes in float32, got float64 for dtype"):
        schulz(x, dtype=torch.float64)
    with pytest.raises(BackendError, match="cannot run newton_schulz: computes in float32, got float64 for x"):
        schulz(x.double(), dtype=torch.bfloat16)
