"""What can be done to any network: load, stream, hoist, fuse, quantise, compile, tile."""
