"""Runs an engine on another CPU, emulated by qemu-user."""
