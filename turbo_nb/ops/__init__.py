"""Operations on tensors: one folder each, its reference beside its kernels."""
