"""The choice of attention: CPUs and GPUs that are not there need no trial, and a kernel that fails is replaced."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.cli.train import run
from visionfm_jax.config import Config, load
from visionfm_jax.errors import ConfigError
from visionfm_jax.models.attention import attention
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train import fused_attention
from visionfm_jax.train.fused_attention import refused, with_attention
from visionfm_jax.train.step import Trainer


def config_of(precision="bf16", attention="auto") -> Config:
    config, _ = load.from_arguments(["--config=configs/swinv2_g_clip.py:tiny"])
    config.train.precision, config.train.batch_size = precision, 8
    config.model.text.attention = attention
    return config


def mesh_of(platform, runtime="pjrt_ifrt", version="cuda 13000"):
    client = SimpleNamespace(runtime_type=runtime, platform_version=version)
    device = SimpleNamespace(platform=platform, client=client)
    return SimpleNamespace(devices=np.array([[device]]))


def kinds(config):
    return {name: network.attention for name, network in config.model.networks().items()}


def no_trial(config):
    raise AssertionError("nothing is to be tried")


@pytest.mark.parametrize(
    ("mesh", "precision", "image"),
    [
        (mesh_of("cpu"), "bf16", "xla"),
        (mesh_of("tpu"), "bf16", "xla"),
        (mesh_of("gpu", version="PJRT rocm 60000"), "bf16", "xla"),
        (mesh_of("gpu"), "fp32", "xla"),  # cuDNN has no attention in fp32
    ],
)
def test_what_needs_no_trial(mesh, precision, image):
    config = config_of(precision, attention="xla")
    assert kinds(with_attention(config, mesh, no_trial)) == {"model.image": image, "model.text": "xla"}
    assert config.model.image.attention == "auto"  # the run's own stays as it was written


def test_gpus_that_are_not_there_run_what_jax_lets_them(capsys):
    mesh, jaxpr = mesh_of("gpu", "compile_only_runtime"), jax.make_jaxpr(lambda: 0)()
    assert kinds(with_attention(config_of(), mesh, lambda config: jaxpr)) == {
        "model.image": "cudnn", "model.text": "cudnn",
    }  # fmt: skip

    def trace(config):
        if config.model.text.attention == "cudnn":
            raise NotImplementedError("head dim 12\nand more")
        return jaxpr

    assert kinds(with_attention(config_of(), mesh, trace)) == {"model.image": "cudnn", "model.text": "xla"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.model.text.attention = auto" in line
    assert "head dim 12" in line


def test_a_kernel_that_does_not_run_is_replaced_and_a_line_says_why(capsys):
    def trace(config):
        return Trainer(config, make_mesh(1, jax.devices()[:1])).traced()

    chosen = with_attention(config_of(), mesh_of("gpu"), trace)  # the kernels run here, on a CPU, and fail
    assert kinds(chosen) == {"model.image": "xla", "model.text": "xla"}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" = auto")[0].split()[-1] for line in lines] == [
        "config.model.image.attention",
        "config.model.text.attention",
    ]
    assert all("dot_product_attention" in line and "cpu" in line for line in lines)


def test_kernels_that_run_are_taken_network_by_network(monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(fused_attention, "refused", lambda found: tried.append(found) or "")
    chosen = with_attention(config_of(), mesh_of("gpu"), lambda config: tuple(kinds(config).values()))
    assert kinds(chosen) == {"model.image": "cudnn", "model.text": "cudnn"}
    assert tried == [("cudnn", "xla"), ("cudnn", "cudnn")]
    assert not capsys.readouterr().err


def test_kernels_are_found_wherever_they_stand():
    def loss(q):
        def body(x, _):
            return jax.checkpoint(lambda a: attention(a, a, a, "cudnn"))(x), None

        return jax.lax.scan(body, q, length=2)[0].astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 16, 2, 8), jnp.bfloat16))
    assert "bfloat16[1,16,2,8]" in refused(jaxpr.jaxpr)  # of one sample
    plain = jax.make_jaxpr(lambda q: attention(q, q, q, "xla"))(jnp.ones((4, 16, 2, 8), jnp.bfloat16))
    assert refused(plain.jaxpr) == ""


def test_a_trainer_on_cpus_computes_xlas():
    trainer = Trainer(config_of(), make_mesh(1, jax.devices()[:1]))
    assert set(kinds(trainer.step_config).values()) == {"xla"}
    assert trainer.config.model.image.attention == "auto"


def test_a_run_refuses_a_kernel_that_its_devices_lack_before_it_has_a_folder(tmp_path):
    config, _ = load.from_arguments(["--config=configs/quickstart.py", f"--config.workdir={tmp_path}"])
    config.train.precision, config.model.attention = "bf16", "cudnn"
    with pytest.raises(ConfigError, match=r"config\.model\.attention = 'cudnn': needs a GPU of NVIDIA.* runs on cpu"):
        run(config, stop=None, watchdog=None)
    assert not list(tmp_path.iterdir())
