"""The fusions, one file each. A file here that defines a `Fusion` subclass is registered by being here."""
