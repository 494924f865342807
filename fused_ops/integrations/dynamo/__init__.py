"""`torch.compile(model, backend="fused_ops")`: patterns of the captured graph run on this package's ops."""

from fused_ops.integrations.dynamo.compile import Listing, backend, record  # noqa: F401
