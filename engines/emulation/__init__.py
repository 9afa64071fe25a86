"""Running an engine as another CPU does, under qemu-user."""
