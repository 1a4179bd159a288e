"""The error that a dtype allows, and results held to it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from tests.support.problems import Call


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    library: Tensor | float | None = None,
    what: str = "output",
    passes: int = 1,
) -> None:
    """Holds ``actual`` to the error that its dtype allows, in the Frobenius norm.

    fp32, fp64: ``|actual - exact| <= 2 u |magnitude|`` for each pass through the chain, with ``u = eps / 2``
    and ``magnitude`` the fp64 computation on absolute values. A gradient takes two passes, there and back:
    over 6,500 random ones PyTorch's own autograd in fp32 reaches 2.3 in units of ``u |magnitude|``, its
    forward chain 1.06. In fp64 ``exact`` is rounded as well, and as often: each of the two is within that budget of the
    true result (against rational numbers the reference reaches 1.8, our kernels without fused multiply-adds 1.1 for
    layers of 5, 3 and 4 features), so that they may lie twice as far apart. bf16, fp16: twice the error of the chain
    in that dtype (``library``: its result, or that error), plus one rounding of the output. The chain's share is capped
    at 2 eps, for a gradient at 2 eps of ``magnitude``: a number that much cancels to has no relative precision.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, required {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    norm = exact.norm().item()
    assert norm > 0, f"{what}: the reference is all zeros, the comparison would prove nothing"
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).norm().item()
    if actual.dtype in (torch.float32, torch.float64):
        rounded = 2 if actual.dtype == torch.float64 else 1  # of `actual` and `exact`
        budget = rounded * passes * eps * magnitude.norm().item()
    else:
        assert library is not None
        library_error = library if isinstance(library, float) else (library.double() - exact).norm().item()
        cap = 2 * eps * (norm if passes == 1 else magnitude.norm().item())
        # The cap first, which also takes the place of NaN: torch's own bf16 convolutions read memory that nothing wrote
        # for some windows (library_bfloat16_fails).
        budget = 2 * min(cap, library_error) + eps / 2 * norm
    assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e}, norm of the reference {norm:.3e}"


def assert_output(call: Call, output: Tensor) -> None:
    """Dtype, shape, strides, freshness and value of an op's output."""
    low = call.problem.dtype in (torch.bfloat16, torch.float16)
    exact = call.exact()
    assert output.dtype == call.problem.dtype
    assert_strides(output, call.tensors["input"])
    storages = {tensor.untyped_storage().data_ptr() for tensor in call.tensors.values() if tensor.numel()}
    assert output.numel() == 0 or output.untyped_storage().data_ptr() not in storages, "the output aliases"
    assert_within_budget(output, exact, call.magnitude(), call.reference(call.problem.dtype) if low else None)


def assert_same_bits_for_any_threads(run: Callable[[], Tensor], counts: tuple[int, ...]) -> None:
    """Runs with each number of threads."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def assert_strides(tensor: Tensor, like: Tensor) -> None:
    """Dense in ``like``'s memory format, as `torch.empty` would allocate it."""
    channels_last = like.dim() == 4 and torch._prims_common.suggest_memory_format(like) == torch.channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    expected = torch.empty(tensor.shape, memory_format=memory_format).stride()
    significant = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    actual = tensor.stride()
    assert [actual[axis] for axis in significant] == [expected[axis] for axis in significant]


def assert_gradients(call: Call, grad_output: Tensor, wanted: Collection[str] | None = None) -> None:
    """Shape, strides, dtype and value of the gradient of every argument, or of the `wanted` ones computed alone.

    The library's error over a handful of numbers says little: it may be a sixth of what is usual (a gradient of five
    elements on a CPU without bf16 instructions, where ours and the plain chain's had the same bits). So where a small
    gradient is beyond it, the usual error counts.
    """
    few = 64
    dtype = call.problem.dtype
    actual = call.gradients(grad_output, wanted)
    exact = call.reference_gradients(grad_output, torch.float64)
    library = call.reference_gradients(grad_output, dtype)
    magnitudes = call.gradient_magnitudes(grad_output)
    for name in actual:
        tensor = call.tensors[name]
        assert actual[name].dtype == dtype
        assert_strides(actual[name], tensor)
        arguments = (actual[name], exact[name], magnitudes[name])
        try:
            assert_within_budget(*arguments, library[name], f"gradient of {name}", passes=2)
        except AssertionError:
            if dtype not in (torch.bfloat16, torch.float16) or tensor.numel() >= few:
                raise
            usual = _usual_error(call, name, grad_output)
            assert_within_budget(*arguments, usual * magnitudes[name].norm().item(), f"gradient of {name}", passes=2)


def _usual_error(call: Call, name: str, grad_output: Tensor, draws: int = 8) -> float:
    """The error of the library's gradient of an argument in the call's dtype, over other gradients of the output.

    Returns:
        The root mean square of ``|library - exact| / |magnitude|``.
    """
    generator = torch.Generator().manual_seed(0)
    squares = 0.0
    for _ in range(draws):
        drawn = torch.randn(grad_output.shape, generator=generator).to(grad_output)
        library, exact = (call.reference_gradients(drawn, dtype)[name] for dtype in (call.problem.dtype, torch.float64))
        error = (library.double() - exact).norm() / call.gradient_magnitudes(drawn)[name].norm()
        squares += error.item() ** 2
    return (squares / draws) ** 0.5
