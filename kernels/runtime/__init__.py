"""How a kernel gets onto a device: what it is (`spec`), compiling it (`compiler`), the driver, and launching it."""
