"""The one number that tasks, training and models must agree on."""

IGNORED = -100  # the target of a position that neither loss nor accuracy looks at; PyTorch's own default
