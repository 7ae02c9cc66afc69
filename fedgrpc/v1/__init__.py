"""Generated from protos/fedgrpc/v1; do not edit."""
