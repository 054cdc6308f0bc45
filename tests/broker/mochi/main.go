// A second broker for the tests: mochi-mqtt, with a log that says the same as mosquitto's in the same
// words, because that is what the tests read. Its sessions end with it: what its stores restore has
// lost its packet ids (2.7.9).
//
// usage: mochi ADDRESS
package main

import (
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
)

type witness struct {
	mqtt.HookBase
	mutex sync.Mutex
}

func (w *witness) ID() string { return "witness" }

func (w *witness) Provides(b byte) bool {
	return b == mqtt.OnPacketRead || b == mqtt.OnPacketSent || b == mqtt.OnPublishDropped
}

func (w *witness) say(format string, values ...any) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	fmt.Printf(format+"\n", values...)
}

func (w *witness) OnPacketRead(client *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	switch pk.FixedHeader.Type {
	case packets.Puback:
		w.say("Received PUBACK from %s (Mid: %d, RC:0)", client.ID, pk.PacketID)
	case packets.Unsubscribe:
		w.say("Received UNSUBSCRIBE from %s", client.ID)
		for _, each := range pk.Filters {
			w.say("\t%s", each.Filter)
		}
	}
	return pk, nil
}

func (w *witness) OnPacketSent(client *mqtt.Client, pk packets.Packet, _ []byte) {
	switch pk.FixedHeader.Type {
	case packets.Suback:
		w.say("Sending SUBACK to %s", client.ID)
	case packets.Pingresp:
		w.say("Sending PINGRESP to %s", client.ID)
	case packets.Publish:
		w.say("Sending PUBLISH to %s (d%d, q%d, r0, m%d, '%s', ... (%d bytes))", client.ID,
			map[bool]int{true: 1}[pk.FixedHeader.Dup], pk.FixedHeader.Qos, pk.PacketID,
			pk.TopicName, len(pk.Payload))
	}
}

func (w *witness) OnPublishDropped(client *mqtt.Client, pk packets.Packet) {
	w.say("Dropped %s for %s", pk.TopicName, client.ID)
}

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	server := mqtt.New(&mqtt.Options{
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	for _, add := range []func() error{
		func() error { return server.AddHook(new(auth.AllowHook), nil) },
		func() error { return server.AddHook(new(witness), nil) },
		func() error {
			return server.AddListener(listeners.NewTCP(listeners.Config{ID: "tcp", Address: os.Args[1]}))
		},
		server.Serve,
	} {
		if err := add(); err != nil {
			log.Fatal(err)
		}
	}
	<-stop
	_ = server.Close()
}
