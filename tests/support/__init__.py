"""What tests share: servers, drivers, clocks."""
