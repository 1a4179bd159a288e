"""Typical workflows with factorized layers, each as one short program.

    python -m examples.workflows.vgg19            the TensorLy notebook: half ranks, CP, its chains taken over
    python -m examples.workflows.course_exercise  a CNN of 12 convolutions, one table of sizes and accuracies
    python -m examples.workflows.rank_sweep       accuracy and latency against the rank of dense layers
    python -m examples.workflows.small_networks   unusual pieces: min-max, rounding, mixup, coarse labels
    python -m examples.workflows.many_settings    initializers, decays, optimizers, a LeNet that moves

Each runs offline, on scikit-learn's digits or on the data set in `--data FOLDER`: CIFAR-10 or CIFAR-100 (python
version), STL-10 (binary version), MNIST or Fashion-MNIST (idx files). With `--small`, narrow networks and few images
show a whole workflow in a minute or two. Without it the networks have their full size: they need the real data set, and
some take hours on a CPU.
"""
