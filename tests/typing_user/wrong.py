"""What an editor has to mark: the lines that end in `# error`, and no other."""

from jax import Array

import jaxent


def functions(logits: Array, labels: Array, kernel: Array) -> None:
    jaxent.cross_entropy(logits, labels, label_smothing=0.1)  # error
    jaxent.cross_entropy(logits, labels, reduction="average")  # error
    jaxent.cross_entopy(logits, labels)  # error
    jaxent.nll(logits, labels, z_loss=1e-4)  # error
    jaxent.linear_cross_entropy(logits, kernel, labels, precision=3)  # error
    jaxent.token_stats(logits, labels, reduction="mean")  # error
    jaxent.cross_entropy(logits, labels, return_stats=True).sum()  # error
    jaxent.cross_entropy(logits, labels, return_stats=True, label_smothing=0.1)  # error
    jaxent.cross_entropy(logits, labels, label_smoothing=0.1)


def objects(nll: jaxent.NLLLoss, loss: jaxent.CrossEntropyLoss, x: Array, labels: Array) -> None:
    jaxent.CrossEntropyLoss(lable_smoothing=0.1)  # error
    jaxent.CrossEntropyLoss(reduction="average")  # error
    nll(x, labels, label_smoothing=0.1)  # error
    loss(x, labels, sample_weights=labels)  # error
    loss(x, labels, reduction="average")  # error
    loss.total_weight(labels, sample_wieght=labels)  # error
    loss(x, labels, sample_weight=labels)


def heads(loss: jaxent.LinearCrossEntropyLoss, head: jaxent.LinearHead, x: Array) -> None:
    loss(x, x, x, axis=-1)  # error
    head.loss(x, x, sample_wieght=x)  # error
    head.loss(x, x, sample_weight=x)
