module h2server

go 1.24
