// Package wire compares our wire types with those of the control planes and of the
// node agents. It is a module of its own, because two copies of a protobuf name
// cannot be in one program: ours are compiled here from their .proto files and are
// never registered.
package wire

import (
	"fmt"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"
	"istio.io/istio/pkg/zdsapi"
)

// roots are the messages that travel, with theirs.
var roots = map[protoreflect.FullName]proto.Message{
	"istio.workload.Address":                            &workloadapi.Address{},
	"istio.security.Authorization":                      &security.Authorization{},
	"envoy.service.discovery.v3.DeltaDiscoveryRequest":  &discovery.DeltaDiscoveryRequest{},
	"envoy.service.discovery.v3.DeltaDiscoveryResponse": &discovery.DeltaDiscoveryResponse{},
	"istio.workload.zds.ZdsHello":                       &zdsapi.ZdsHello{},
	"istio.workload.zds.WorkloadRequest":                &zdsapi.WorkloadRequest{},
	"istio.workload.zds.WorkloadResponse":               &zdsapi.WorkloadResponse{},
}

// complete are those of which we must know every field: in a policy, one that we
// do not know fails closed, and a node agent's message that we do not know ends the
// connection.
var complete = map[protoreflect.FullName]bool{
	"istio.workload.Address": true, "istio.security.Authorization": true,
	"istio.workload.zds.ZdsHello": true, "istio.workload.zds.WorkloadRequest": true, "istio.workload.zds.WorkloadResponse": true,
}

// renamed are fields whose name is not that of the generated code.
var renamed = map[string]string{"rules": "groups", "clauses": "rules"}

func ours(t *testing.T) map[protoreflect.FullName]protoreflect.MessageDescriptor {
	t.Helper()
	compiler := protocompile.Compiler{
		Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{"../.."}}),
	}
	files, err := compiler.Compile(t.Context(),
		"xds/workloadpb/workload.proto", "xds/securitypb/authorization.proto", "xds/discoverypb/discovery.proto",
		"proxy/inpod/zdspb/zds.proto")
	if err != nil {
		t.Fatal(err)
	}
	found := map[protoreflect.FullName]protoreflect.MessageDescriptor{}
	for _, f := range files {
		for i := range f.Messages().Len() {
			found[f.Messages().Get(i).FullName()] = f.Messages().Get(i)
		}
	}
	return found
}

func TestFieldsAreThoseOfTheControlPlanes(t *testing.T) {
	messages := ours(t)
	for name, theirs := range roots {
		c := comparison{t: t, complete: complete[name], seen: map[protoreflect.FullName]bool{}}
		c.message(string(name), messages[name], theirs.ProtoReflect().Descriptor())
	}
}

type comparison struct {
	t        *testing.T
	complete bool
	seen     map[protoreflect.FullName]bool
}

func (c *comparison) message(path string, ours, theirs protoreflect.MessageDescriptor) {
	if c.seen[ours.FullName()] || theirs.ParentFile().Package() == "google.protobuf" {
		if ours.FullName().Parent() == "google.protobuf" && ours.FullName() != theirs.FullName() {
			c.t.Errorf("%s: %s, theirs is %s", path, ours.FullName(), theirs.FullName())
		}
		return
	}
	c.seen[ours.FullName()] = true
	for i := range ours.Fields().Len() {
		field := ours.Fields().Get(i)
		c.field(path, field, theirs.Fields().ByNumber(field.Number()))
	}
	for i := range theirs.Fields().Len() {
		field := theirs.Fields().Get(i)
		if c.complete && ours.Fields().ByNumber(field.Number()) == nil {
			c.t.Errorf("%s: we lack %d %s", path, field.Number(), field.Name())
		}
	}
}

func (c *comparison) field(path string, ours, theirs protoreflect.FieldDescriptor) {
	path = fmt.Sprintf("%s.%s", path, ours.Name())
	if theirs == nil {
		c.t.Errorf("%s: they have no field %d", path, ours.Number())
		return
	}
	if theirs.Name() != ours.Name() && renamed[string(ours.Name())] != string(theirs.Name()) {
		c.t.Errorf("%s: theirs is called %s", path, theirs.Name())
	}
	if ours.Kind() != theirs.Kind() || ours.Cardinality() != theirs.Cardinality() || ours.IsMap() != theirs.IsMap() ||
		ours.HasPresence() != theirs.HasPresence() || ours.IsPacked() != theirs.IsPacked() {
		c.t.Errorf("%s: %v %v, theirs is %v %v", path, ours.Cardinality(), ours.Kind(), theirs.Cardinality(), theirs.Kind())
		return
	}
	switch {
	case ours.Kind() == protoreflect.MessageKind:
		c.message(path, ours.Message(), theirs.Message())
	case ours.Kind() == protoreflect.EnumKind:
		c.enum(path, ours.Enum().Values(), theirs.Enum().Values())
	}
}

func (c *comparison) enum(path string, ours, theirs protoreflect.EnumValueDescriptors) {
	if ours.Len() != theirs.Len() {
		c.t.Errorf("%s: %d values, theirs has %d", path, ours.Len(), theirs.Len())
	}
	for i := range ours.Len() {
		v := ours.Get(i)
		if same := theirs.ByNumber(v.Number()); same == nil || same.Name() != v.Name() {
			c.t.Errorf("%s: %d is %s, theirs is %v", path, v.Number(), v.Name(), same)
		}
	}
}

// Bytes of theirs with every field of ours set are read, and written again, by our
// types without loss.
func TestBytesAreExchanged(t *testing.T) {
	for name, descriptor := range ours(t) {
		theirs, ok := roots[name]
		if !ok {
			continue
		}
		for variant := range 4 { // which member of a oneof
			message := theirs.ProtoReflect().New()
			fill(message, descriptor, variant, 0)
			sent, err := proto.MarshalOptions{Deterministic: true}.Marshal(message.Interface())
			if err != nil {
				t.Fatal(err)
			}
			received := dynamicpb.NewMessage(descriptor)
			if err := proto.Unmarshal(sent, received); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			answer, err := proto.MarshalOptions{Deterministic: true}.Marshal(received)
			if err != nil {
				t.Fatal(err)
			}
			back := theirs.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(answer, back); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if unknown(received) || !proto.Equal(back, message.Interface()) {
				t.Errorf("%s, variant %d: sent %v, got back %v", name, variant, message, back)
			}
		}
	}
}

// fill sets every field of m that ours has, too.
func fill(m protoreflect.Message, ours protoreflect.MessageDescriptor, variant, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		known := ours.Fields().ByNumber(f.Number())
		if known == nil || depth > 6 {
			continue
		}
		if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() && o.Fields().Get(variant%o.Fields().Len()) != f {
			continue
		}
		element := func(m protoreflect.Message, f, known protoreflect.FieldDescriptor, v protoreflect.Value) protoreflect.Value {
			if f.Kind() != protoreflect.MessageKind {
				return scalar(f)
			}
			fill(v.Message(), known.Message(), variant, depth+1)
			return v
		}
		switch {
		case f.IsMap():
			entries := m.Mutable(f).Map()
			entries.Set(scalar(f.MapKey()).MapKey(), element(m, f.MapValue(), known.MapValue(), entries.NewValue()))
		case f.IsList():
			list := m.Mutable(f).List()
			list.Append(element(m, f, known, list.NewElement()))
		default:
			m.Set(f, element(m, f, known, m.NewField(f)))
		}
	}
}

// scalar returns a value that is not the zero value.
func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(7)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(7)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(7)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(7)
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{1, 2, 3, 4})
	}
	return protoreflect.ValueOfString("x")
}

// unknown tells whether a field of m, at any depth, was not known.
func unknown(m protoreflect.Message) bool {
	found := len(m.GetUnknown()) > 0
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() && f.MapValue().Kind() == protoreflect.MessageKind:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				found = found || unknown(v.Message())
				return true
			})
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				found = found || unknown(v.List().Get(i).Message())
			}
		case !f.IsList() && !f.IsMap() && f.Kind() == protoreflect.MessageKind:
			found = found || unknown(v.Message())
		}
		return true
	})
	return found
}
