module weir.example/tests/unit/gotemplate

go 1.22
