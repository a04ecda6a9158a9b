"""Classes of datasets and models: what may be matched, and what is refused with both maps shown."""

import pytest
import torch
from transformers import ViTConfig

from hf_distill.training.labels import balanced_weights, check_every_class, class_counts, class_order, names_of

NAMES = ["ant", "tree frog", "cat"]


def config(*names: str) -> ViTConfig:
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def test_generic_names_are_taken_for_real_ones():
    assert names_of(ViTConfig(num_labels=3)) is None
    assert names_of(config("0", "1", "2")) is None
    assert class_order(NAMES, ViTConfig(num_labels=3), what="teacher") is None
    with pytest.raises(ValueError, match="the teacher has 4 classes and the dataset 3 .ant, tree frog, cat."):
        class_order(NAMES, ViTConfig(num_labels=4), what="teacher")


def test_classes_of_another_order_are_compared_as_they_stand():
    assert class_order(NAMES, config("Ant", "tree_frog", "cat"), what="teacher") is None
    assert class_order(NAMES, config("cat", "ant", "Tree-Frog"), what="teacher") == [1, 2, 0]
    assert class_order(NAMES, config("cat", "dog", "ant", "tree frog"), what="teacher") == [2, 3, 0]


def test_classes_of_other_names_are_not_refused():
    with pytest.raises(ValueError, match="Dataset: ant, tree frog, cat. Teacher: ant, bee, cat.*--same_label_order"):
        class_order(NAMES, config("ant", "bee", "cat"), what="teacher")
    assert class_order(NAMES, config("ant", "bee", "cat"), what="teacher", same_order=True) is None
    with pytest.raises(ValueError, match="2 classes"):
        class_order(NAMES, config("ant", "bee"), what="teacher", same_order=True)


def test_a_class_without_examples_goes_unseen():
    assert class_counts([0, 2, 2], 3).tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="class means needs examples of every class.*none of tree frog"):
        check_every_class([0, 2, 2], NAMES, "class means")
    with pytest.raises(ValueError, match="balancing classes by weights"):
        balanced_weights([0, 2, 2], NAMES)
    with pytest.raises(ValueError, match="between 0 and 2, got 0 to 3"):
        class_counts([0, 3], 3)


def test_balanced_weights_change_the_size_of_the_loss():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = balanced_weights(labels, NAMES)
    torch.testing.assert_close(weights[labels].mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights, torch.tensor([6 / 9, 2.0, 1.0]))
