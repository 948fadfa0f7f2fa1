"""Starting kernels, recording what would be started, and that both mean the same machine code."""

import torch

from gfxlm.device.arch import PORTABLE, architecture, named
from gfxlm.kernels.launch import is_recording, recording
from gfxlm.kernels.record import record
from tests.kernels.compiled import run_python
from tests.kernels.toy import TOY, total_kernel, totals

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_launch_runs() -> None:
    x = torch.randn(3, 300, device=DEVICE)
    torch.testing.assert_close(totals(x), 2 * x.sum(1))


def test_recording_collects_and_runs_nothing() -> None:
    x = torch.empty(3, 300, device="meta", dtype=torch.bfloat16)
    with recording(named("gfx1151")) as launches:
        assert is_recording()
        assert architecture(torch.device("meta")).name == "gfx1151"
        totals(x, num_warps=2)
    assert not is_recording()
    assert architecture(torch.device("meta")) == PORTABLE
    [one] = launches
    assert one.kernel is total_kernel
    assert one.grid == (3,)
    assert one.arguments[0] is x
    assert one.arguments[2:] == (3, 300, 300)
    assert one.constants == {"BLOCK": 128}
    assert one.options == {"num_warps": 2, "enable_fp_fusion": True}


def test_recording_ends_with_an_error() -> None:
    try:
        with recording(named("gfx1151")):
            raise KeyError
    except KeyError:
        assert not is_recording()


def test_a_case_is_recorded_without_memory() -> None:
    launches = record(TOY, named("gfx942"))
    assert [launch.grid for launch in launches] == [(4,)]
    assert all(a.is_meta for launch in launches for a in launch.arguments if isinstance(a, torch.Tensor))


SAME = """
import json, torch
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from gfxlm.device.arch import named
from gfxlm.kernels import launch as launch_module
from gfxlm.kernels.launch import gpu_target, recording
from tests.kernels.toy import totals

started = []
torch.cuda.current_device = lambda: None  # a CPU's tensors then pass for the current GPU's
JITFunction._do_compile = lambda self, key, signature, device, constants, options, attrs, warmup: started.append(
    (signature, constants, attrs, options))
result = []
for name in ("gfx1151", "gfx942", "sm_90"):
    arch = named(name)
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: name, get_current_stream=lambda device: 0,
        get_current_target=lambda: gpu_target(arch)))
    for columns, offset in ((1000, 0), (1024, 0), (1, 0), (1024, 1), (17, 3)):
        def use(device):
            base = torch.empty(4 * columns + 4, device=device)
            totals(base[offset : offset + 4 * columns].view(4, columns), num_warps=2)
        launch_module._started.clear()
        use("cpu")  # as a GPU's launch would: Triton itself specialises, and then would compile
        with recording(arch) as launches:
            use("meta")
        code = launches[0].specialize(arch)
        result.append([repr((code.signature, code.constants, code.attributes, code.options)), repr(started.pop())])
print(json.dumps(result))
"""


def test_what_is_recorded_is_what_is_started() -> None:
    result = run_python(SAME)
    assert len(result) == 15
    for recorded, started in result:
        assert recorded == started
    assert len({started for _, started in result}) >= 9  # sizes, alignment and architectures do make a difference


KINDS = """
import json, torch
from gfxlm.device.arch import named
from gfxlm.kernels import launch
from tests.kernels.toy import total_kernel

launch._HIP = True
half = torch.empty(1 << 31, dtype=torch.bfloat16, device="meta")
values = [0, 1, 2, 15, 16, -16, -1, 2**31 - 1, 2**31 - 16, 2**31, -2**31, 2**40, 2**63, 2**64 - 16, 1.0, 0.5]
values += [True, False, None, half, half[1:], half[8:], half[:100].clone(), half.view(torch.int16)]
values.append(torch.empty(9, device="meta"))
found = []
for name in ("gfx1151", "sm_90"):
    binder = launch._binder(total_kernel, launch.gpu_target(named(name)))
    told = [(launch._kind(value), binder(value, 0, 0, 0, 0, BLOCK=1)[1][0]) for value in values]
    found += [repr((a, b)) for a in told for b in told if a[0] == b[0] and a[1] != b[1]]
print(json.dumps(found))
"""


def test_launches_of_one_kind_are_of_one_machine_code() -> None:
    """What a repeated launch is looked up by tells apart whatever Triton specialises in."""
    assert run_python(KINDS) == []


KEYS = """
import json, torch
from gfxlm.device.arch import named
from gfxlm.kernels.launch import recording
from tests.kernels.toy import totals

def key(columns, dtype=torch.float32, **options):
    with recording(named("gfx1151")) as launches:
        totals(torch.empty(4, columns, device="meta", dtype=dtype), **options)
    return launches[0].specialize(named("gfx1151")).key

different = [key(1000), key(1008), key(1), key(1000, num_warps=2), key(1000, torch.bfloat16)]
print(json.dumps([*different, key(1001), key(1024)]))
"""


def test_keys_tell_machine_code_apart() -> None:
    keys = run_python(KEYS)
    assert len(set(keys[:5])) == 5
    assert keys[5] == keys[0]  # neither is 1 or a multiple of 16
    assert keys[6] == keys[1]
