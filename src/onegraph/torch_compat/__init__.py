"""Every private torch call, one function per need, feature-probed over the supported versions of torch."""
