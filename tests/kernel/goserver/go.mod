module goserver

// from 1.24 on net/http listens with MPTCP where the kernel has it
go 1.24
