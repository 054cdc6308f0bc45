module example.com/weir/telemetry

go 1.24
