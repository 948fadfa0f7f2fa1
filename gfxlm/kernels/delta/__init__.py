"""The gated delta net: causal convolution, the rule over chunks and step by step, one fused decode step."""
