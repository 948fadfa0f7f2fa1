"""What a case has to reach on one H200: the bars of the project, by the case's name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bar:
    """At most `us` microseconds, at least `tb_s` TB/s or `tflops` TFLOP/s, or a share of what the device can do."""

    us: float | None = None
    tb_s: float | None = None
    tflops: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        texts = (
            self.us and f"≤ {self.us:g} µs",
            self.tb_s and f"≥ {self.tb_s:g} TB/s",
            self.tflops and f"≥ {self.tflops:g} TFLOP/s",
            self.share and f"≥ {self.share:.0%}",
        )
        return ", ".join(text for text in texts if text)


BARS = {
    "matvec/4096x4096/affine4g64/bfloat16/m1": Bar(tb_s=1.8),
    "matvec/24576x4096/affine4g64/bfloat16/m1": Bar(tb_s=2.9),
    "matvec/4096x12288/affine4g64/bfloat16/m1": Bar(tb_s=2.4),
    "matvec/151936x4096/affine4g64/bfloat16/m1": Bar(tb_s=3.3),
    # The experts' part of the block, whose bar has the router in it, too.
    "moe_decode/coder-next/affine4g64/bf16/t1": Bar(us=25),
    "moe_decode/coder-next/affine4g64/bf16/t8": Bar(us=90),
    "wide/24576x4096/affine4/m512": Bar(tflops=350),
    "wide/24576x4096/affine4/m2048": Bar(tflops=550),
    "moe_prefill/coder-next/t512": Bar(us=1000),
    "moe_prefill/coder-next/t2048": Bar(us=1600),
    "attention_decode/32x8x128/bf16/n1-32768": Bar(share=0.75),
    "attention_decode/16x2x256/bf16/n1-32768": Bar(share=0.65),
    "attention_prefill/32x8x128/bf16/t8192": Bar(tflops=300),
    "attention_prefill/16x2x256/bf16/t8192": Bar(tflops=300),
    "delta_prefill/coder-next/bfloat16/t2048": Bar(us=160),
    "delta_decode/coder-next/bfloat16/n1": Bar(us=9),
    "add_rms_norm/1x2048": Bar(us=4),
    "add_rms_norm/1x4096": Bar(us=4),
    "qkv/32x8x128/bf16/m1": Bar(us=4),
    "qkv/16x2x256/bf16/m1": Bar(us=4),
    "greedy/1x151936/bfloat16": Bar(us=8),
    "draw_filtered/1x151936/bfloat16": Bar(us=40),
}
